"""Do the tests notice? Changes one thing of a module at a time and runs the tests of that line, in a forked process.

    python tools/dev/mutants.py [--sample 150] [--seed 0] [--seconds 60] [--keep FOLDER] [FILE ...]

First the tests of the rooms run once as things are, which tells who runs which line and for how long; with --keep that
stays in FOLDER, and is used again from there. A mutant then gets the tests of its line, the fastest first, for so many
seconds of theirs. It is killed by a failing test, by a failing import, or where it takes ten times as long. Prints a
line for each mutant and the score. All of it happens in a copy of the checkout, where a test that runs the package in
a process of its own sees the mutant too; nothing is changed here.
"""

from __future__ import annotations

from checkout import ROOT  # first: is this the right Python?

# isort: split

import argparse
import ast
import copy
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from coverage import CoverageData

TESTS = tuple(f'tests/{room}' for room in ('layers', 'ops', 'checkpoint', 'surgery', 'host', 'engine', 'models'))
PLACES = ('layers/*.py', 'ops/bnet.py', 'ops/dispatch.py', 'checkpoint/*.py', 'surgery/*.py')
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
    elif isinstance(node, ast.Return) and not (node.value is None or is_none(node.value)):
        new.value = ast.Constant(None)
        yield 'return None', new
    elif isinstance(node, ast.Raise) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield 'left out', ast.Pass()


def is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def mutants(path: Path, root: Path) -> Iterator[tuple[str, range, ast.Module]]:
    """All mutants of a module, one at a time: what is changed, its lines, and the tree, which changes back."""
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
                    lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                    what = f'{path.relative_to(root)}:{node.lineno} {word}: {ast.unparse(node).splitlines()[0]}'
                    yield what, lines, tree
                    put(parent, name, i, node)


def put(parent: ast.AST, name: str, i: int, node: ast.AST) -> None:
    value = getattr(parent, name)
    if isinstance(value, list):
        value[i] = node
    else:
        setattr(parent, name, node)


def survives(tests: list[str], timeout: int, path: Path, tree: ast.Module) -> bool:
    """Whether the tests pass, in a forked process, while the module at ``path`` is the mutant ``tree``."""
    text = path.read_text()
    path.write_text(ast.unparse(tree))
    try:
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        code = 9
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 5))
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1), os.dup2(nowhere, 2)
            import pytest

            code = int(pytest.main(['-x', '-p', 'no:cacheprovider', *tests]))
        finally:
            os._exit(code)
    finally:
        path.write_text(text)


class Runs:
    """Which tests ran which lines of the package, as things are, and how long they took."""

    def __init__(self, folder: Path, tests: list[str]) -> None:
        data, report = folder / '.coverage', folder / 'tests.xml'
        if not report.exists():
            command = ['-m', 'pytest', '-n', '2', '--cov=bnet_mm', '--cov-context=test', '--cov-report=', *tests]
            partial = report.with_suffix('.part')
            options = [f'--junit-xml={partial}', '-o', 'junit_family=xunit1']
            env = dict(os.environ, COVERAGE_FILE=str(data), OMP_NUM_THREADS='1')
            if subprocess.run([sys.executable, *command, *options], env=env, stdout=subprocess.DEVNULL).returncode:
                sys.exit(f'error: {" ".join(tests)} fail without any change, so that they would kill everything')
            partial.rename(report)
        self.seconds = {}
        for case in ElementTree.parse(report).iter('testcase'):
            inside = case.get('classname', '').removeprefix(case.get('file', '').removesuffix('.py').replace('/', '.'))
            name = '::'.join(filter(None, [case.get('file'), *inside.split('.'), case.get('name')]))
            self.seconds[name] = float(case.get('time', 0))
        self.data = CoverageData(str(data))
        self.data.read()

    def of(self, path: Path, lines: range, seconds: float) -> list[str]:
        """The tests that ran one of the lines (of the module, at its top), the fastest first, until the time is up."""
        contexts = self.data.contexts_by_lineno(str(path))
        names = {context.rpartition('|')[0] for line in lines for context in contexts.get(line, ())} - {''}
        if not names:  # it runs when the module is imported
            names = {context.rpartition('|')[0] for line in contexts.values() for context in line}
        found = sorted((self.seconds[name], name) for name in names if name in self.seconds)
        ends = itertools.accumulate(spent for spent, _ in found)
        return [name for i, (end, (_, name)) in enumerate(zip(ends, found)) if end <= seconds or i == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('files', nargs='*', type=Path, help='modules; default those of the rooms above')
    parser.add_argument('--sample', type=int, default=150, help='how many mutants, drawn by chance (150)')
    parser.add_argument('--seed', type=int, default=0, help='of the sample (0)')
    parser.add_argument('--seconds', type=int, default=60, help='of tests that a mutant gets (60)')
    parser.add_argument('--keep', type=Path, metavar='FOLDER', help='where the first run of the tests is kept')
    parser.add_argument('--tests', nargs='+', default=TESTS, help='those that are run (%(default)s)')
    args = parser.parse_args()
    if args.sample < 1:
        parser.error(f'--sample takes a number above 0, got {args.sample}')
    for path in args.files:
        if not path.is_file() or not path.resolve().is_relative_to(ROOT / 'bnet_mm'):
            parser.error(f'{path} is not a module of {ROOT}/bnet_mm')
    if missing := [path for path in args.tests if not (ROOT / path.partition('::')[0]).exists()]:
        parser.error(f'--tests {missing[0]}: there is none')
    with tempfile.TemporaryDirectory() as temporary:
        try_mutants(args, args.keep or Path(temporary))


def copy_of_the_checkout(folder: Path) -> Path:
    """The one in ``folder`` if there is one already."""
    target = folder / 'tree'
    if not target.exists():
        folder.mkdir(exist_ok=True)
        left_out = shutil.ignore_patterns('.*', 'build', 'dist', 'data', 'work_dirs', 'checkpoints', '__pycache__')
        shutil.copytree(ROOT, target, ignore=left_out)
    return target.resolve()


def try_mutants(args: argparse.Namespace, folder: Path) -> None:
    root = copy_of_the_checkout(folder)
    os.chdir(root)
    sys.path[:0] = [str(root), str(root / 'tests')]
    os.environ['PYTHONPATH'] = os.pathsep.join(sys.path[:2])
    files = [root / path.resolve().relative_to(ROOT) for path in args.files]
    files = files or [path for place in PLACES for path in root.glob(f'bnet_mm/{place}')]
    found = [(path, n, what) for path in sorted(files) for n, (what, *_) in enumerate(mutants(path, root))]
    sample = random.Random(args.seed).sample(found, min(args.sample, len(found)))
    runs = Runs(folder, args.tests)
    import mmcv.cnn  # noqa: F401  (what takes long to import, once for all; nothing of this package)
    import mmengine.runner  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    left = []
    for i, (path, n, what) in enumerate(sample, 1):
        begin = time.time()
        _, lines, tree = next(itertools.islice(mutants(path, root), n, None))
        tests = runs.of(path, lines, args.seconds)
        alive = not tests or survives(tests, 10 * args.seconds, path, tree)
        left += [f'{what} ({len(tests)} tests)'] if alive else []
        print(f'{i}/{len(sample)} {"SURVIVED" if alive else "killed"} {time.time() - begin:.0f} s  {what}', flush=True)
    killed = len(sample) - len(left)
    print(f'{killed} of {len(sample)} killed ({killed / len(sample):.1%}), drawn from {len(found)}; survivors:')
    print(*left, sep='\n')


if __name__ == '__main__':
    main()
