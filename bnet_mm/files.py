"""Outputs: never over something that exists, and never half a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_target(path: str | os.PathLike) -> None:
    """Refuse, before any work, an output that exists already or whose folder does not exist.

    Raises:
        FileExistsError, FileNotFoundError: As said.
    """
    if os.path.exists(path):
        raise FileExistsError(f'{path} exists already')
    if not os.path.isdir(os.path.dirname(path) or '.'):
        raise FileNotFoundError(f'the folder of {path} does not exist')


def make_folder(path: str | os.PathLike) -> None:
    """Make a folder for outputs, with those above it, unless it is there.

    Raises:
        NotADirectoryError: If it, or one above it, is a file.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f'{path} is no folder for outputs: there is a file of that name') from error


@contextmanager
def written(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside ``path``, for a file or folder that gets its own name when all went well.

    After an error, or an interrupt, nothing is left. The suffix of ``path`` stays the last one, as writers go by it.
    """
    path = Path(path)
    temporary = path.with_name(f'part{os.getpid()}_{path.name}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
