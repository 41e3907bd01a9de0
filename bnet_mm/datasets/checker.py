"""Whether a data set's folder is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from bnet_mm.datasets.catalogue import DataSet, fill_in
from bnet_mm.datasets.readers import Sample
from bnet_mm.messages import first_of

SHOWN = 10  # problems, and paths in a problem, before only their number is given


def check(data: DataSet, root: Path, any_size: bool, opened: int) -> list[str]:
    """What is wrong, a sentence each, what is missing first; prints what was looked at."""
    parts: dict[str, list[Sample]] = {}
    missing: set[str] = set()
    problems = []
    for part, (_, read) in data.parts.items():
        try:
            parts[part] = read(root)
        except FileNotFoundError as error:
            missing.add(outermost_missing(root, os.path.relpath(error.filename, root)))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    for part, samples in parts.items():
        if not any_size or not samples:
            problems += check_numbers(part, samples, data.parts[part][0], data.classes)
        files = (file for sample in samples for file in (sample.file, sample.mask) if file)
        absent = {file for file in files if not os.path.isfile(f'{root}/{file}')}
        missing |= {outermost_missing(root, file) for file in absent}
        whole = [sample for sample in samples if not absent & {sample.file, sample.mask}]
        chosen = np.unique(np.linspace(0, len(whole) - 1, max(0, min(opened, len(whole)))).astype(int))
        for number in chosen:
            try:
                data.look(root, whole[number], data.classes)
            except ValueError as error:
                problems.append(str(error))
        print(f'{part}: {len(samples)} samples, {len(absent)} files missing, {len(chosen)} samples opened')
    return [*name_missing(data, root, missing), *problems, *check_lists(parts, data.classes)]


def outermost_missing(root: Path, file: str) -> str:
    """The first folder that is missing on the way to the file, or the file."""
    path = root / file
    while path.parent != root and not path.parent.exists():
        path = path.parent
    return path.relative_to(root).as_posix()


def check_numbers(part: str, samples: list[Sample], count: int, classes: int) -> Iterator[str]:
    found = [(len(samples), count, 'samples')]
    labels = samples[0].coco.cats if samples and samples[0].coco else {sample.label for sample in samples} - {None}
    if labels:
        found.append((len(labels), classes, 'classes'))
    for number, published, what in found:
        if number != published:
            yield f'{part} has {number} {what}, the published data set {published} (--any-size takes fewer)'


def check_lists(parts: dict[str, list[Sample]], classes: int) -> Iterator[str]:
    """Nothing twice, labels in range, and the same label for a class folder everywhere."""
    part_of: dict[str, str] = {}
    label_of: dict[str, int] = {}
    for part, samples in parts.items():
        for sample in samples:
            if sample.file in part_of:
                yield f'{sample.file}, listed in {part}, is in {part_of[sample.file]} already'
            part_of[sample.file] = part
            if sample.label is None:
                continue
            if sample.label >= classes:
                yield f'{sample.file} has the label {sample.label} in {part}, beyond 0 to {classes - 1}'
            _, *folder, _ = sample.file.split('/')
            if folder and sample.label != label_of.setdefault(folder[0], sample.label):
                yield f'{sample.file} has the label {sample.label} in {part}, its class {label_of[folder[0]]} before'


def name_missing(data: DataSet, root: Path, missing: set[str]) -> Iterator[str]:
    """One sentence for what the same command makes; the last command that fits is the one."""
    by_command: dict[str, list[str]] = {}
    for path in sorted(missing):
        fits = [command for makes, command in data.commands if any(fnmatch(path, one) for one in makes.split())]
        by_command.setdefault(fits[-1] if fits else '', []).append(str(root / path))
    for command, paths in by_command.items():
        made_by = f'; made by: {fill_in(command, root)}' if command else ''
        yield f'missing: {first_of(paths, SHOWN)}{made_by}'
