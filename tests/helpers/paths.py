"""Where things are on the disk."""

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SHARED_DATA = REPO.parent / 'shared' / 'data'  # real images for trials, not part of the package
