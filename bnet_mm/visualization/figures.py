"""Figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bnet_mm.files import written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, path: Path, dpi: int = 150) -> None:
    """Save a figure in the format of the path's suffix; after an error there is no half of a file."""
    with written(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
