"""The compiled CPU kernels: every instruction set, any number of threads."""

import re
from pathlib import Path

import pytest

from helpers.kernels import compiled
from helpers.tools import python

SETS = {'default': 'generic', 'avx2': 'AVX2', 'avx512': 'AVX-512'}
NEEDS = {
    'default': set(), 'avx2': {'avx2', 'fma'}, 'avx512': {'avx2', 'fma', 'avx512f', 'avx512bw', 'avx512dq', 'avx512vl'},
}  # fmt: skip
CPUINFO = Path('/proc/cpuinfo')
CHECK_A_SET = """
import itertools, torch
from helpers import kernels
torch.manual_seed(0)
assert torch.ops.bnet_mm.cpu_instruction_set() == {name!r}
for i, (k, dtype, channels_last) in enumerate(itertools.product((1, 3, 5, 7), kernels.DTYPES, (0, 1))):
    kernels.check_errors(k, bool(channels_last), kernels.DTYPES[dtype], kernels.SHAPES[i % 2 :: 2])
for case in kernels.MOMENTS:
    kernels.check_moments(*case)
"""


@compiled
@pytest.mark.parametrize('capability', SETS)
def test_instruction_sets(capability):
    """The same bounds with each set that this processor has; torch and the extension go by the same variable."""
    flags = re.search(r'^flags\s*:(.*)', CPUINFO.read_text() if CPUINFO.exists() else '', re.M)
    if lacking := NEEDS[capability] - set(flags[1].split() if flags else ()):
        pytest.skip(f'this processor has no {", ".join(sorted(lacking))}')
    done = python(CHECK_A_SET.format(name=SETS[capability]), ATEN_CPU_CAPABILITY=capability)
    assert done.returncode == 0, done.stderr


HASHES = """
import hashlib, itertools, torch
from bnet_mm import BNET
from bnet_mm.ops.bnet import bnet, moments
from helpers import kernels, reference
values = []
for threads in (1, 2, 2, 1):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    parts = hashlib.sha256()
    for channels_last, dtype, k in itertools.product((0, 1), kernels.DTYPES.values(), (1, 3, 7)):
        for shape in [(3, 19, 14, 17), (1, 2, 57, 129), (8, 33, 7, 7), (3, 1, 20, 30)]:
            inputs = kernels.make_inputs(shape, k, dtype, k == 3, bool(channels_last))
            got = kernels.run(bnet, inputs, torch.randn(shape).to(dtype), relu=True)
            got.update(enumerate(moments(inputs['x'], k == 1)[1:]))
            layer = reference.randomise(BNET(shape[1], k))
            x = inputs['x'].requires_grad_()
            got.update(layer=torch.autograd.grad(layer(x).square().sum(), x)[0])
            for value in got.values():
                parts.update(value.detach().double().contiguous().numpy().tobytes())
    values.append(parts.hexdigest())
assert len(set(values)) == 1, values
"""


@compiled
def test_bit_equal_over_runs_and_numbers_of_threads():
    done = python(HASHES, OMP_NUM_THREADS='2')
    assert done.returncode == 0, done.stderr
