"""A user's folder: its files, what its names say of splits, and what is found of images and labels."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from bnet_mm.datasets.readers import PICTURES, list_files, read_lines
from bnet_mm.messages import first_of

SPLITS = ('train', 'val', 'test')
SPLIT_NAME = re.compile(r'(?<![a-z])(train|training|val|valid|validation|test|testing)(?![a-z])')

VOC_MARK = re.compile(r'\s+-?[01]$')  # whether the class of the list is in the image


@dataclass
class Labelled:
    """An image with its labels; files are relative to the folder.

    size: (width, height) that the labels are for, where they say it.
    objects: COCO annotations without ids, ``category`` being the name of the class.
    labels: The file that they come from; the image where it has none.
    mask: A semantic mask in their place.
    """

    file: str
    labels: str
    size: tuple[int, int] | None = None
    objects: list[dict[str, Any]] = field(default_factory=list)
    mask: str | None = None
    split: str | None = None


@dataclass
class Found:
    """What a folder has, and what is wrong with it.

    problems: Sentences; nothing is written if there are any.
    notes: Sentences with the files that they are about, for what was seen and taken care of.
    """

    format: str
    samples: list[Labelled] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def of(self, split: str) -> list[Labelled]:
        return [sample for sample in self.samples if sample.split == split]

    def sentences(self) -> list[str]:
        """The notes, a sentence each."""
        return [f'{note}: {first_of(files)}' for note, files in self.notes.items()]


class Folder:
    """The files below a folder, hidden ones left out, as paths relative to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = [os.path.normpath(file) for file in list_files(root, '.', '')]
        self.images = self.ending(PICTURES)

    def ending(self, suffix: str | tuple[str, ...]) -> list[str]:
        return [file for file in self.files if file.lower().endswith(suffix)]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        names = defaultdict(list)
        for file in self.images:
            names[PurePosixPath(file).name].append(file)
        return names

    @cached_property
    def _splits_of_images(self) -> set[str | None]:
        return {split_of(file) for file in self.images} - {None}

    def image(self, name: str, split: str | None) -> str | None:
        """The image that labels of this split call ``name``, a path or the end of one; None if there is none.

        Raises:
            ValueError: If there are several.
        """
        name = name.replace('\\', '/')  # labelled under Windows
        found = [file for file in self._by_name[PurePosixPath(name).name] if f'/{file}'.endswith(f'/{name}')]
        if split in self._splits_of_images:  # the image of this name in another split is another one
            found = [file for file in found if split_of(file) in (None, split)]
        if len(found) > 1:
            raise ValueError(f'{first_of(found)} are all called {name}')
        return found[0] if found else None

    @cached_property
    def listed_splits(self) -> dict[str, str]:
        """Stem of image -> split, from lists such as ImageSets/Main/train.txt or train.txt; empty without any."""
        splits: dict[str, str] = {}
        for file in self.ending('.txt'):
            path = PurePosixPath(file)
            if path.parent.name in ('Layout', 'Action') or not SPLIT_NAME.fullmatch(path.stem):
                continue
            lines = [VOC_MARK.sub('', line.strip()) for line in read_lines(self.root / file) if line.strip()]
            splits.update((PurePosixPath(line).stem, split_of(path.stem) or '') for line in lines)
        return splits

    @cached_property
    def declared_splits(self) -> dict[str, str]:
        """Split -> the first list or folder that is called so, with or without images."""
        lists = [file for file in self.ending('.txt') if SPLIT_NAME.fullmatch(PurePosixPath(file).stem)]
        folders = [
            os.path.relpath(f'{where}/{name}', self.root)
            for where, names, _ in os.walk(self.root, followlinks=True)
            for name in names
        ]
        places = {split_of(PurePosixPath(place).name): place for place in sorted([*lists, *folders], reverse=True)}
        return {split: place for split, place in places.items() if split}

    def split(self, file: str) -> str | None:
        """The split of an image or label file: by the lists, else by the names of its folders; None if neither says."""
        return self.listed_splits.get(PurePosixPath(file).stem) or split_of(str(PurePosixPath(file).parent))


def split_of(path: str) -> str | None:
    """train, val or test if a name in the path says so, as in ``images/train2017/1.jpg`` and ``instances_val.json``."""
    names = SPLIT_NAME.findall(path.lower())
    return next((split for split in SPLITS if names and names[-1].startswith(split)), None)
