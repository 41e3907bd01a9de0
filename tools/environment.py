"""Imported first by every tool: one sentence, not a traceback, where this Python lacks the libraries.

Only the standard library. tools/find_python.sh is the same for the shell scripts.
"""

from __future__ import annotations

import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

NEEDED = ('torch', 'mmengine', 'cv2', 'bnet_mm')


def missing_sentence(missing: list[str], tool: str) -> str:
    """Which libraries are missing, and how to run the tool with those that a checkout's .venv has."""
    sentence = f'this Python, {sys.executable}, has no {" and no ".join(missing)}'
    for folder in Path(__file__).resolve().parents:
        if (folder / '.venv' / 'bin' / 'python').exists():
            python = folder / '.venv' / 'bin' / 'python'
            return f'{sentence}; the environment beside it has: . {python.parent}/activate, or {python} {tool} ...'
        if (folder / 'tools' / 'install.sh').exists():
            return f'{sentence}; make an environment that has: bash {folder}/tools/install.sh'
    return sentence


lacking = [name for name in NEEDED if find_spec(name) is None]
if lacking:
    print(f'error: {missing_sentence(lacking, sys.argv[0])}', file=sys.stderr)
    sys.exit(2)
# Of mmengine and everything that uses it, several times per process, and nothing that a user could mend.
warnings.filterwarnings('ignore', 'pkg_resources is deprecated as an API')
