"""tools/dev/mutants.py."""

import ast
import re

import pytest

import mutants
from helpers.tools import run

CODE = """
def f(a: int = 1, b: 'int | None' = None) -> int:
    if not a < 2 and b:
        raise ValueError(f'{a + 1}')
    print(a)
    return a * 2
"""


def test_every_kind_of_change(tmp_path):
    """Each is made alone, and undone; messages and types are left alone."""
    (tmp_path / 'a.py').write_text(CODE)
    original = ast.unparse(ast.parse(CODE))
    found = {what.split(' ', 1)[1]: ast.unparse(tree) for what, _, tree in mutants.mutants(tmp_path / 'a.py', tmp_path)}
    assert all(text != original for text in found.values())
    changed = [(a, b) for text in found.values() for a, b in zip(original.splitlines(), text.splitlines()) if a != b]
    assert ('    if not a < 2 and b:', '    if not a <= 2 and b:') in changed
    assert ('    if not a < 2 and b:', '    if a < 2 and b:') in changed
    assert ('    if not a < 2 and b:', '    if not a < 2 or b:') in changed
    assert ('    if not a < 2 and b:', '    if True:') in changed and ('    print(a)', '    pass') in changed
    assert ('    return a * 2', '    return a / 2') in changed and ('    return a * 2', '    return None') in changed
    assert {kind.split(':')[0] for kind in found} == {
        'comparison', 'not', 'and/or', 'if True', 'if False', 'left out', 'return None', 'arithmetic', 'constant'
    }  # fmt: skip
    assert not any(re.search(r'a [-*] 1', text) for text in found.values())


@pytest.mark.hardening
def test_changes_are_noticed(tmp_path):
    options = ('--sample', 4, '--keep', tmp_path, '--tests', 'tests/layers/test_bnet.py')
    done = run('tools/dev/mutants.py', 'bnet_mm/layers/arguments.py', *options)
    assert done.returncode == 0, done.stderr
    assert '4/4' in done.stdout and ' of 4 killed' in done.stdout and '0 of 4' not in done.stdout
    tests = mutants.Runs(tmp_path, []).of(tmp_path / 'tree/bnet_mm/layers/arguments.py', range(1, 100), 1)
    assert tests and all(name.startswith('tests/layers/test_bnet.py::') for name in tests)
