"""tools/dev/matrix.sh, with stand-ins for Python and the packages; and the table of what it has written."""

import os
import subprocess

import pytest

import matrix_table as tool
from bnet_mm.cli import UserError
from helpers.paths import REPO

SCRIPT = REPO / 'tools' / 'dev' / 'matrix.sh'
# Makes environments with itself as their interpreter; what else it is called with stands in `calls`.
PYTHON = r"""#!/bin/bash
case "$*" in
    '-m venv '*) mkdir -p "${*: -1}"/{bin,lib/python3.11/site-packages}; cp "$0" "${*: -1}/bin/python" ;;
    *) echo "$PWD $*; PYTHONPATH=$PYTHONPATH; compiler: $(type -P cc); TMPDIR=$TMPDIR" >>"$CALLS" ;;
esac
"""
PACKAGES = ('torch', 'numpy', 'numpy-2.0.dist-info', 'numpy.libs', 'mmcv', 'mmdet', 'bnet_mm-1.dist-info')
TWO = 'tests/a tests/b'


@pytest.fixture
def matrix(tmp_path):
    """matrix(*arguments): the script in a repository of its own; the finished process and the calls of Python."""
    root = tmp_path / 'checkout'
    packages = root / '.venv' / 'lib' / 'python3.11' / 'site-packages'
    for path in (
        root / 'tools/dev',
        root / 'bnet_mm',
        root / '.venv/bin',
        tmp_path / 'bin',
        *map(packages.joinpath, PACKAGES),
    ):
        path.mkdir(parents=True)
    (root / 'tools/dev/matrix.sh').write_text(SCRIPT.read_text())
    (root / '.gitignore').write_text('.venv\n.matrix/\n*.so\n')
    for name in ('__init__.py', '_cpu.so'):
        (root / 'bnet_mm' / name).touch()
    for path, text in ((root / '.venv/bin/python', PYTHON), (tmp_path / 'bin/cc', '#!/bin/sh\n')):
        path.write_text(text)
        path.chmod(0o755)
    git = ['git', '-C', root, '-c', 'user.name=a', '-c', 'user.email=a@b']
    for words in (['init', '-q'], ['add', '-A'], ['commit', '-qm', 'all']):
        subprocess.run([*git, *words], check=True)

    def run(*arguments):
        calls = tmp_path / 'calls'
        calls.write_text('')
        env = {**os.environ, 'PATH': f'{tmp_path}/bin:/usr/bin:/bin', 'CALLS': str(calls)}
        script = ['bash', root / 'tools/dev/matrix.sh', *arguments]
        done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=60)
        return done, calls.read_text().splitlines()

    run.root = root
    return run


def test_row_with_another_package(matrix):
    done, calls = matrix('numpy-1')
    assert done.returncode == 0, done.stderr
    pip, tests, record = calls
    row = matrix.root / '.matrix' / 'numpy-1'
    assert ' -m pip install numpy<2;' in pip
    assert sorted(path.name for path in (row / 'below').iterdir()) == ['mmcv', 'mmdet', 'torch']
    assert (row / 'environment/lib/python3.11/site-packages/below.pth').read_text() == f'{row}/below\n'
    assert tests.startswith(f'{row}/checkout -m pytest ') and f'PYTHONPATH={row}/checkout;' in tests
    assert (row / 'checkout' / 'bnet_mm' / '_cpu.so').exists()
    assert f'matrix_table.py --add numpy-1 {row}/results ' in record and ' tests/checkpoint ' in record
    done, calls = matrix('numpy-1')
    assert done.returncode == 0 and len(calls) == 2  # the environment is there


def test_rows_of_other_machines(matrix):
    _, (tests, _) = matrix('no-compiler')
    assert 'compiler: ;' in tests and not (matrix.root / '.matrix/no-compiler/checkout/bnet_mm/_cpu.so').exists()
    _, (tests, _) = matrix('spaces')
    row = matrix.root / '.matrix/spaces/a folder'
    assert tests.startswith(f'{row}/checkout ') and f'{row}/temporary files' in tests and 'bin/cc;' in tests


@pytest.mark.parametrize('arguments', [[], ['torch-9'], ['torch-2.14', 'forks'], ['torch-2.14 torch-2.13']])
def test_wrong_name(arguments):
    done = subprocess.run(['bash', SCRIPT, *arguments], capture_output=True, text=True)
    names = ' '.join(tool.rows())
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == f'error: one name is needed, of {names}; got {" ".join(arguments) or "none"}\n'


def test_no_environment(matrix):
    (matrix.root / '.venv').rename(matrix.root / 'elsewhere')
    done, _ = matrix('torch-2.14')
    assert done.returncode == 2 and done.stderr.startswith('error: no environment in .venv: bash tools/install.sh')


def test_page_is_not_stale():
    page = tool.PAGE.read_text()
    assert tool.page_text(page, tool.RESULTS) == page
    assert {row['name'] for row in tool.read_results(tool.RESULTS)} <= tool.rows().keys()


def row(**changed):
    texts = dict(
        date='2026-11-28', python='3.11.7', torch='2', numpy='1', hosts='mmcv 2', processor='AVX2', minutes='4.0'
    )
    numbers = dict(passed='7', failed='0', skipped='2', revision='abc', tests=TWO, failures='', kernels='')
    return texts | numbers | changed


def test_table(tmp_path):
    """The last line of each row counts; what was not run is said to be."""
    lines = [
        row(name='forks'),
        row(name='home', tests='tests/a'),
        row(name='forks', failed='1', failures='test_a::test_b'),
    ]
    tool.write_results(lines, tmp_path / 'matrix.csv')
    text = tool.page_text('Words.\n<!-- matrix: rows -->old<!-- /matrix -->', tmp_path / 'matrix.csv')
    found = {line.split('`')[1]: line for line in text.splitlines() if line.startswith('| `')}
    assert list(found) == list(tool.rows()) and 'old' not in text
    assert found['forks'].endswith('| 3.11.7, 2, 1 | mmcv 2 | A | 7, 1, 2 | 4.0 | 2026-11-28, abc, AVX2 |')
    assert '| B | 7, 0, 2 |' in found['home'] and '| not run |' in found['torch-2.1']
    assert '- A: `tests/a`, `tests/b`\n- B: `tests/a`\n- failed: forks: test_a::test_b\n' in text


def test_results_of_several_processes(tmp_path):
    with pytest.raises(UserError, match='no test was run'):
        tool.counts(tmp_path)
    case = '<testcase classname="tests.test_a" name="{}">{}</testcase>'
    for name, cases in (
        ('one', case.format('x', '') + case.format('y', '<skipped/>')),
        ('two', case.format('x', '<failure/>') + case.format('z', '<error/>') + case.format('w', '')),
    ):
        (tmp_path / f'{name}.xml').write_text(f'<testsuites><testsuite>{cases}</testsuite></testsuites>')
    assert tool.counts(tmp_path) == dict(passed='2', failed='2', skipped='1', failures='test_a::x test_a::z')
