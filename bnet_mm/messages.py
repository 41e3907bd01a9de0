"""Words that several error messages and reports share."""

from __future__ import annotations

from collections.abc import Iterable


def first_of(names: Iterable[object], most: int = 4) -> str:
    """The first ``most`` names, comma-separated, and how many more there are: 'a, b and 3 more'."""
    words = [str(name) for name in names]
    return ', '.join(words[:most]) + (f' and {len(words) - most} more' if len(words) > most else '')
