"""Words that several error messages and reports share."""

from __future__ import annotations

from collections.abc import Iterable


def first_of(names: Iterable[object], most: int = 4) -> str:
    """The first ``most`` names, comma-separated, and how many more there are: 'a, b and 3 more'."""
    names = [str(name) for name in names]
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
