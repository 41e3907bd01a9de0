"""The other files of this folder in Triton's interpreter, which is chosen before Triton's first import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnet_mm.ops import triton
from helpers.paths import REPO
from helpers.triton_cases import CUDA, INTERPRETED


@pytest.mark.skipif(INTERPRETED, reason='is the interpreter')
@pytest.mark.parametrize(
    'names, least', [(('kernels',), 52), (('launchers', 'plans', 'triton'), 17)], ids=['kernels', 'others']
)
def test_in_the_interpreter(names, least):
    files = [Path(__file__).with_name(f'test_{name}.py') for name in names]
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-p', 'no:xdist', *files]
    environment = dict(os.environ, TRITON_INTERPRET='1')
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=900)
    passed = re.search(r'(\d+) passed', done.stdout)
    assert done.returncode == 0 and int(passed[1]) >= least, done.stdout[-6000:] + done.stderr


def test_load_says_what_is_missing():
    if INTERPRETED or CUDA:
        assert triton.load().startswith('Triton 3') and triton.load().endswith('interpreter') == INTERPRETED
        assert torch._C._dispatch_has_kernel_for_dispatch_key('bnet_mm::forward', 'CUDA' if CUDA else 'CPU')
    else:
        with pytest.raises(ImportError, match='no CUDA device'):
            triton.load()
