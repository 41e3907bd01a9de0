"""tools/make_toy_data.py as a user runs it."""

from helpers.tools import run


def test_toy_data_is_seeded_and_not_overwritten(shapes, tmp_path):
    options = ('--train', 16, '--val', 6, '--size', 96)
    assert run('tools/make_toy_data.py', 'coco', tmp_path / 'again', *options).returncode == 0
    for file in sorted(path for path in shapes.rglob('*') if path.is_file()):
        assert file.read_bytes() == (tmp_path / 'again' / file.relative_to(shapes)).read_bytes()
    done = run('tools/make_toy_data.py', 'coco', shapes)
    assert done.returncode != 0 and 'exists already' in done.stderr
