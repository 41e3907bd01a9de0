"""The table of what was run where in tools/README.md: python tools/dev/matrix_table.py [--check]

Its rows are those of tools/dev/matrix.sh, with what came out of each last time, from the lines that the script has
added to tools/dev/matrix.csv. --check writes nothing and fails if the page is stale.
"""

from __future__ import annotations

from checkout import ROOT  # first: is this the right Python?

# isort: split

import argparse
import csv
import platform
import re
from collections.abc import Iterator
from datetime import date
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import numpy
import torch

from bnet_mm.cli import UserError, run_tool
from bnet_mm.files import written
from bnet_mm.ops import backend_report
from pages import fill, markdown

SCRIPT = ROOT / 'tools' / 'dev' / 'matrix.sh'
RESULTS = SCRIPT.with_suffix('.csv')
PAGE = ROOT / 'tools' / 'README.md'
HOSTS = ('mmcv', 'mmengine', 'mmdet', 'mmseg', 'mmaction', 'mmpretrain')
FIELDS = (
    'name', 'date', 'python', 'torch', 'numpy', 'hosts', 'processor', 'kernels', 'passed', 'failed', 'skipped',
    'minutes', 'revision', 'tests', 'failures',
)  # fmt: skip
Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing, fail if the page is stale')
    added = ('NAME', 'FOLDER', 'SECONDS', 'REVISION', 'TESTS')
    parser.add_argument('--add', nargs=5, metavar=added, help='a run of a row, whose JUnit files are in FOLDER')
    args = parser.parse_args()
    failures = ''
    if args.add:
        name, folder, seconds, revision, tests = args.add
        row = here() | counts(Path(folder))
        row |= dict(name=name, minutes=f'{int(seconds) / 60:.1f}', revision=revision, tests=tests)
        write_results([*read_results(RESULTS), row], RESULTS)
        failures = row['failures']
    old = PAGE.read_text()
    new = page_text(old, RESULTS)
    if args.check and new != old:
        raise UserError('tools/README.md is stale; run python tools/dev/matrix_table.py')
    if not args.check:
        with written(PAGE) as temporary:
            temporary.write_text(new)
    if failures:
        raise SystemExit(f'failed: {failures}')


def rows() -> dict[str, str]:
    """Name of each row of the script -> what it is."""
    return dict(re.findall(r"^    '([\w.-]+): (.+)'$", SCRIPT.read_text(), re.MULTILINE))


def here() -> Row:
    """What this Python has."""
    packages = metadata.packages_distributions()
    names = [distribution for host in HOSTS for distribution in packages.get(host, [])[:1]]
    return dict(
        date=date.today().isoformat(), python=platform.python_version(), torch=torch.__version__,
        numpy=numpy.__version__, hosts=', '.join(f'{host} {metadata.version(host)}' for host in names),
        processor=torch.backends.cpu.get_cpu_capability(), kernels=backend_report()['cpp'],
    )  # fmt: skip


def counts(folder: Path) -> Row:
    """Of all the JUnit files in a folder.

    Raises:
        UserError: If there is none.
    """
    files = sorted(folder.glob('*.xml'))
    cases = [case for file in files for case in ElementTree.parse(file).iter('testcase')]
    if not cases:
        raise UserError(f'no test was run: {folder} has no results')
    failed = [case for case in cases if case.find('failure') is not None or case.find('error') is not None]
    skipped = [case for case in cases if case.find('skipped') is not None]
    names = sorted({f'{case.get("classname", "").rpartition(".")[2]}::{case.get("name")}' for case in failed})
    return dict(
        passed=str(len(cases) - len(failed) - len(skipped)), failed=str(len(failed)), skipped=str(len(skipped)),
        failures=' '.join(names),
    )  # fmt: skip


def read_results(path: Path) -> list[Row]:
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_results(results: list[Row], path: Path) -> None:
    with written(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(results)


def page_text(text: str, results: Path) -> str:
    return fill(text, 'matrix', dict(rows=list(section(read_results(results)))))


def section(results: list[Row]) -> Iterator[str]:
    """The table, and which tests the letters in it stand for."""
    last = {row['name']: row for row in results}
    letters = {tests: chr(ord('A') + i) for i, tests in enumerate(dict.fromkeys(row['tests'] for row in last.values()))}
    header = ('row', 'what', 'Python, torch, numpy', 'OpenMMLab', 'tests', 'passed, failed, skipped', 'minutes', 'when')
    yield from markdown(header, [cells(name, what, last.get(name), letters) for name, what in rows().items()])
    yield ''
    for tests, letter in letters.items():
        yield f'- {letter}: {", ".join(f"`{test}`" for test in tests.split())}'
    if failures := [f'{row["name"]}: {row["failures"]}' for row in last.values() if row['failures']]:
        yield f'- failed: {"; ".join(failures)}'


def cells(name: str, what: str, row: Row | None, letters: dict[str, str]) -> tuple[str, ...]:
    if row is None:
        return (f'`{name}`', what, '', '', '', 'not run', '', '')
    return (
        f'`{name}`', what, f'{row["python"]}, {row["torch"]}, {row["numpy"]}', row['hosts'], letters[row['tests']],
        f'{row["passed"]}, {row["failed"]}, {row["skipped"]}', row['minutes'],
        f'{row["date"]}, {row["revision"]}, {row["processor"]}',
    )  # fmt: skip


if __name__ == '__main__':
    run_tool(main)
