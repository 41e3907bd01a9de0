"""tools/dev/newcomer.sh, on a repository whose commands are stand-ins; and what it would type here."""

import subprocess
import sys

import pytest

from helpers import newcomer
from helpers.paths import REPO
from test_documents import TEXTS

SCRIPT = REPO / 'tools' / 'dev' / 'newcomer.sh'
README = """## Two commands

```bash
bash demo.sh     # makes a page
bash tests.sh
```

## More

```bash
bash more.sh
```
"""
PAGE = 'work_dirs/demo/shapes/page'
SCRIPTS = {
    'demo.sh': f'mkdir -p {PAGE}; echo "<img>" >{PAGE}/index.html',
    'tests.sh': 'true', 'more.sh': 'echo "more: $1"',
    'tests/helpers/newcomer.py': 'import sys\nprint("bash more.sh \'a b\'", "not typed: pip x (why)", sep="\\n")',
}  # fmt: skip


@pytest.fixture
def type_in(tmp_path):
    """type_in(**scripts): the script on a repository with these in the place of SCRIPTS."""

    def run(**changed):
        repository = tmp_path / 'repository'
        for name, text in {**SCRIPTS, 'README.md': README, **changed}.items():
            path = repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        git = ['git', '-C', repository, '-c', 'user.name=a', '-c', 'user.email=a@b']
        for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'all']):
            subprocess.run([*git, *words], check=True)
        (tmp_path / 'bin').mkdir(exist_ok=True)
        (tmp_path / 'bin' / 'python').symlink_to(sys.executable)
        return call(repository, tmp_path / 'clone', PATH=f'{tmp_path}/bin:/usr/bin:/bin')

    return run


def call(*arguments, **env):
    return subprocess.run(['bash', SCRIPT, *arguments], env=env, capture_output=True, text=True, timeout=60)


def test_types_and_checks(type_in, tmp_path):
    """Word for word, in order, with times; the page is looked for, and what is not typed is said."""
    done = type_in()
    lines = done.stdout.splitlines()
    typed = ['bash demo.sh     # makes a page', 'bash tests.sh', "bash more.sh 'a b'"]
    assert done.returncode == 0 and [line[2:] for line in lines if line.startswith('$ ')][1:] == typed, done.stderr
    assert 'more: a b' in lines and 'not typed: pip x (why)' in lines
    assert lines[-1].endswith(f'{tmp_path}/clone/{PAGE}/index.html') and '[0 s] bash tests.sh' in lines


@pytest.mark.parametrize('changed, message', [
    ({'tests.sh': 'exit 3'}, 'error: this failed after 0 s: bash tests.sh'),
    ({'demo.sh': 'true'}, 'error: the demo left no page with pictures: none'),
    ({'demo.sh': f'mkdir -p {PAGE}; touch {PAGE}/index.html'}, f'no page with pictures: {PAGE}/index.html'),
    ({'more.sh': 'exit 1'}, "error: this failed after 0 s: bash more.sh 'a b'"),
    ({'tests/helpers/newcomer.py': 'raise SystemExit(1)'}, 'error: no commands of the other sections'),
    ({'README.md': '# Nothing\n'}, "error: README.md has no commands in its section 'Two commands'"),
])  # fmt: skip
def test_stops_at_the_first_failure(type_in, changed, message):
    done = type_in(**changed)
    assert done.returncode != 0 and message in done.stdout + done.stderr
    assert 'all of it' not in done.stdout


def test_wrong_arguments(tmp_path):
    path = dict(PATH='/usr/bin:/bin')
    for arguments, message in (
        (['a', 'b', 'c'], 'a repository and a folder at most, got a b c'),
        ([tmp_path / 'no'], f'{tmp_path}/no is no git repository'),
        ([REPO, tmp_path], f'{tmp_path} is there, and is no clone'),
    ):  # fmt: skip
        done = call(*arguments, **path)
        assert done.returncode == 2 and done.stderr.startswith(f'error: {message}') and not done.stdout


def test_every_command_of_the_readme_is_typed_or_left_out_for_a_reason():
    left_out = newcomer.left_out()
    typed = [command for command, reason in left_out.items() if not reason]
    assert [command.split()[1] for command in typed] == [
        'tools/convert_config.py', 'tools/convert_config.py', 'tools/my_data.py', 'tools/predict.py'
    ]  # fmt: skip
    assert not any(command in left_out for command in ('bash tools/run_demo.sh', 'bash tools/run_tests.sh'))
    assert [
        word for word in ('FOLDER', 'CONFIG', 'CHECKPOINT', 'photos/', 'clip.mp4') if word not in TEXTS['README.md']
    ] == []
    lines = list(newcomer.commands('data/my shapes', 'a.pth'))
    assert any("my_data.py 'data/my shapes' --config configs/" in line for line in lines)
    assert not any(word in line for line in lines for word in ('FOLDER', 'CHECKPOINT', 'CONFIG '))
