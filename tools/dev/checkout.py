"""First import of the tools in this folder: asks for the right Python, and puts tools/ and tests/ on the path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / 'tools'), str(ROOT / 'tests')]

import environment  # noqa: E402, F401
