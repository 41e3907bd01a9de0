"""The checkpoint from which a run goes on."""

from __future__ import annotations

import zipfile
from pathlib import Path

NOTE = 'last_checkpoint'  # where mmengine's CheckpointHook writes the path of what it has saved


def latest_checkpoint(work_dir: str | Path) -> Path | None:
    """The checkpoint that mmengine's note in ``work_dir`` names; None without a note, or where nothing is left.

    A folder that was moved holds the file of that name. A note that names nothing else (its process was killed while
    it wrote the note) is passed over for the newest complete file with an optimizer, which ``best_*.pth`` lack.
    """
    note = Path(work_dir) / NOTE
    if not note.is_file():
        return None
    named = Path(note.read_text().strip())
    for path in (named, note.parent / named.name):
        if path.is_file():
            return path
    # torch.save writes a zip file, whose table of contents comes last
    saved = [path for path in note.parent.glob('*.pth') if not path.name.startswith('best_')]
    return max(filter(zipfile.is_zipfile, saved), key=lambda path: path.stat().st_mtime, default=None)
