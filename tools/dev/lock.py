"""The locks of tools/install.sh: python tools/dev/lock.py [--upgrade | --check]

requirements/dev.in, by hand, is the one input. From it uv resolves requirements/pyXYZ.txt for each Python on x86-64
Linux: every version, with the hashes that the registry gives. What a lock has already stays where the input allows it.

--upgrade takes the newest of everything. --check writes nothing, needs no registry, and fails where a lock is not what
the input asks for.
"""

from __future__ import annotations

from checkout import ROOT  # first: is this the right Python?

# isort: split

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bnet_mm.cli import UserError, run_tool
from bnet_mm.files import written

FOLDER = ROOT / 'requirements'
INPUT = FOLDER / 'dev.in'
RUN = '3.11'
PYTHONS = ('3.10', RUN, '3.12', '3.13')
COMMAND = 'python tools/dev/lock.py'
HEAD = f'# Python {{}}, x86-64 Linux; {{}}. Written from dev.in by `{COMMAND}`, which also checks it; not by hand.\n'
BUILDING = 'setuptools<81\n'  # as in the input: mmcv's metadata is what its build script says


def lock_of(python: str) -> Path:
    return FOLDER / f'py{python.replace(".", "")}.txt'


def head(python: str) -> str:
    return HEAD.format(python, 'this one is installed and tested' if python == RUN else 'resolved, not run')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--upgrade', action='store_true', help='take the newest versions that the input allows')
    what.add_argument('--check', action='store_true', help='write nothing, fail if a lock is not what is asked for')
    args = parser.parse_args()
    if args.check:
        wrong = [f'{lock_of(python).name}: {what}' for python in PYTHONS for what in differences(python)]
        if wrong:
            raise UserError(f'not what {INPUT.name} asks for, run `{COMMAND}`: {"; ".join(wrong)}')
        return
    for python in PYTHONS:
        resolve(python, args.upgrade)
        print(f'{lock_of(python).relative_to(ROOT)}: {len(pins(lock_of(python).read_text()))} packages')


def resolve(python: str, upgrade: bool = False) -> None:
    """Write the lock of one Python.

    Raises:
        UserError: uv finds no versions that go together, or no registry.
    """
    lock = lock_of(python)
    with written(lock) as part, tempfile.NamedTemporaryFile('w', suffix='.txt') as building:
        building.write(BUILDING)
        building.flush()
        part.write_text(lock.read_text() if lock.exists() else '')
        options = ['--python-version', python, '--python-platform', 'x86_64-manylinux_2_28', '--generate-hashes']
        options += ['--build-constraint', building.name, '--no-header', '--quiet', '-o', part]
        uv = [sys.executable, '-m', 'uv', 'pip', 'compile', INPUT.name, *options]
        done = subprocess.run([*map(str, uv), *['--upgrade'] * upgrade], cwd=FOLDER, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'uv resolves nothing for Python {python}: {" ".join(done.stderr.split())}')
        part.write_text(head(python) + part.read_text())


def pins(lock: str) -> dict[str, str]:
    """Name and version of everything in the text of a lock."""
    return {canonicalize_name(name): version for name, version in re.findall(r'^([\w.-]+)==([^ ;\\\n]+)', lock, re.M)}


def asked(lock: str) -> set[str]:
    """The names that the resolver took from the input, by its notes in the text of a lock."""
    blocks = re.findall(r'^([\w.-]+)==(.*\n(?:[ ].*\n)*)', lock, re.M)
    return {canonicalize_name(name) for name, block in blocks if f'-r {INPUT.name}' in block}


def differences(python: str) -> list[str]:
    """What in the lock of one Python is not what the input asks for, in words."""
    lines = [line.split('#')[0].strip() for line in INPUT.read_text().splitlines()]
    wanted = {canonicalize_name(need.name): need for need in map(Requirement, filter(None, lines))}
    if not lock_of(python).exists():
        return ['missing']
    text = lock_of(python).read_text()
    locked, marker = pins(text), dict(python_version=python, python_full_version=f'{python}.0')
    wanted = {name: need for name, need in wanted.items() if need.marker is None or need.marker.evaluate(marker)}
    wrong = [f'has no {need}' for name, need in wanted.items() if name not in locked]
    wrong += [
        f'{name} {locked[name]} is not {need}'
        for name, need in wanted.items()
        if name in locked and not need.specifier.contains(locked[name], prereleases=True)
    ]
    wrong += [f'{name} is asked for no longer' for name in sorted(asked(text) - set(wanted))]
    wrong += [f'{name} has no hash' for name in re.findall(r'^([\w.-]+)==[^\\\n]*$', text, re.M)]
    return wrong if text.startswith(head(python)) else [*wrong, 'its head is another']


if __name__ == '__main__':
    run_tool(main)
