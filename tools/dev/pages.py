"""Tables in a page that are written from data, each between <!-- KIND: NAME --> and <!-- /KIND -->."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from bnet_mm.cli import UserError


def fill(text: str, kind: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The text with the lines of every section in its place.

    Raises:
        UserError: If a section has none.
    """
    place = re.compile(rf'(<!-- {kind}: (\w+) -->).*?(<!-- /{kind} -->)', re.DOTALL)
    if missing := sections.keys() - {match[2] for match in place.finditer(text)}:
        raise UserError(f'the page has no place for {", ".join(sorted(missing))}: <!-- {kind}: NAME -->')
    return place.sub(lambda match: '\n'.join([match[1], '', *sections[match[2]], '', match[3]]), text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (header, ['---'] * len(header), *rows):
        yield f'| {" | ".join(cells)} |'
