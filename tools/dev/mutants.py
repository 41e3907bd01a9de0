"""Do the tests notice? Changes one thing in a module at a time and runs the tests of its room, in a forked process.

    python tools/dev/mutants.py [--sample 150] [--seed 0] [--timeout 120] [--quick] [FILE ...]

A mutant is killed by a failing test, by a failing import or by the timeout (of processor time). One that survives the
tests named like its module is given to the others of its room. Prints a line for each mutant and the score; the
changed code is never written to the disk. Tests that run the package in processes of their own see the unchanged code.
"""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import importlib.machinery
import importlib.util
import itertools
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACES = ('layers/*.py', 'ops/bnet.py', 'ops/dispatch.py', 'checkpoint/*.py', 'surgery/*.py')
# Where the tests of a module have another name than it, or stand in another room, too.
NEARBY = {
    'layers/affine_free': ('layers/test_buffers.py', 'layers/test_normalizers.py'),
    'layers/normalizers': ('layers/test_normalizers.py', 'layers/test_bnet.py'),
    'layers/bnet': ('layers/test_bnet.py', 'layers/test_taps_loading.py', 'layers/test_normalizers.py'),
    'ops/bnet': ('ops/test_bnet.py', 'ops/test_gradients.py'),
    'checkpoint/convert': ('checkpoint/test_layouts.py', 'tools/test_convert_checkpoint.py'),
    'checkpoint/safe_load': ('checkpoint/test_safe_load.py',),
    'surgery/activations': ('surgery/test_config.py',),
    'surgery/modules': ('surgery/test_enhance.py',),
    'surgery/report': ('surgery/test_enhance.py',),
}
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may stand in the place of a node, with a word on it."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
        yield 'comparison', new
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        new.op = ARITHMETIC[type(node.op)]()
        yield 'arithmetic', new
    elif isinstance(node, ast.BoolOp):
        new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield 'and/or', new
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield 'not', new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        new.value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield 'constant', new
    elif isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            other = copy.deepcopy(node)
            other.test = ast.Constant(value)
            yield f'if {value}', other
    elif isinstance(node, ast.Return) and node.value is not None:
        new.value = ast.Constant(None)
        yield 'return None', new
    elif isinstance(node, ast.Raise) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield 'left out', ast.Pass()


def mutants(path: Path) -> Iterator[tuple[str, ast.Module]]:
    """All mutants of a module, one at a time: what is changed, and the tree, which changes back afterwards."""
    tree = ast.parse(path.read_text())
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]  # messages, and types
    hints = [getattr(node, 'annotation', None) for node in ast.walk(tree)]
    skipped = {id(inner) for node in (*texts, *filter(None, hints)) for inner in ast.walk(node)}
    for parent in list(ast.walk(tree)):
        for name, value in ast.iter_fields(parent):
            for i, node in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(node, ast.AST) or id(node) in skipped:
                    continue
                for word, new in changes(node):
                    put(parent, name, i, ast.copy_location(new, node))
                    yield f'{path.relative_to(ROOT)}:{node.lineno} {word}: {ast.unparse(node).splitlines()[0]}', tree
                    put(parent, name, i, node)


def put(parent: ast.AST, name: str, i: int, node: ast.AST) -> None:
    value = getattr(parent, name)
    if isinstance(value, list):
        value[i] = node
    else:
        setattr(parent, name, node)


def survives(tests: list[str], timeout: int, path: Path | None = None, tree: ast.Module | None = None) -> bool:
    """Whether the tests pass in a forked process, in which the module at ``path`` is the mutant ``tree``."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    code = 9
    module = '.'.join(path.relative_to(ROOT).with_suffix('').parts) if path else ''
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1), os.dup2(nowhere, 2)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str):
                return compile(ast.fix_missing_locations(tree), str(path), 'exec')

        class Finder:
            @staticmethod
            def find_spec(name: str, *_):
                return importlib.util.spec_from_loader(name, Loader(name, str(path))) if name == module else None

        sys.meta_path.insert(0, Finder)
        import pytest

        code = int(pytest.main(['-x', '-p', 'no:cacheprovider', *tests]))
    finally:
        os._exit(code)


@functools.cache
def passes(tests: tuple[str, ...], timeout: int) -> bool:
    """Whether the tests pass as things are."""
    return survives(list(tests), timeout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='*', type=Path, help='modules; default those of the rooms above')
    parser.add_argument('--sample', type=int, default=150, help='how many mutants, drawn by chance (150)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--timeout', type=int, default=120, help='seconds of processor time for a run of tests')
    parser.add_argument('--quick', action='store_true', help='only the tests named like the module')
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    files = [path.resolve() for path in args.files] or [p for place in PLACES for p in ROOT.glob(f'bnet_mm/{place}')]
    found = [(path, n, what) for path in sorted(files) for n, (what, _) in enumerate(mutants(path))]
    sample = random.Random(args.seed).sample(found, min(args.sample, len(found)))
    import mmcv.cnn  # noqa: F401  (what takes long to import, once for all; nothing of this package)
    import mmengine.runner  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    left = []
    for i, (path, n, what) in enumerate(sample, 1):
        begin, name, room = time.time(), str(path.relative_to(ROOT / 'bnet_mm').with_suffix('')), room_of(path)
        _, tree = next(itertools.islice(mutants(path), n, None))
        near = [f'tests/{test}' for test in NEARBY.get(name, (f'{room}/test_{path.stem}.py',))]
        near = [test for test in near if Path(test).exists()]
        wide = sorted(str(test) for test in Path(f'tests/{room}').glob('test_*.py') if str(test) not in near)
        alive = True
        for tests in filter(None, (near or wide,) if args.quick else (near, wide)):
            if alive and not passes(tuple(tests), 10 * args.timeout):
                sys.exit(f'error: {" ".join(tests)} fail without any change, so that they would kill everything')
            alive = alive and survives(tests, args.timeout, path, tree)
        left += [what] if alive else []
        print(f'{i}/{len(sample)} {"SURVIVED" if alive else "killed"} {time.time() - begin:.0f} s  {what}', flush=True)
    killed = len(sample) - len(left)
    print(f'{killed} of {len(sample)} killed ({killed / len(sample):.1%}), drawn from {len(found)}; survivors:')
    print(*left, sep='\n')


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / 'bnet_mm').parts[0]


if __name__ == '__main__':
    main()
