"""Which backend runs: the choice with pretended backends, the variable, and a package without its extension."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import bnet_mm
from bnet_mm import BNET
from bnet_mm.ops import backend_report, bnet, describe_backend, dispatch, select_backend

FLOAT, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
X = torch.ones(1, 2, 3, 4)


@pytest.fixture
def pretend(monkeypatch):
    """pretend(cpp=..., triton=...): a word if the backend can be loaded, or the error that its loader raises."""

    def replace(**outcomes):
        def loader(outcome):
            def load():
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome

            return load

        table = dict(dispatch.BACKENDS)
        for name, outcome in outcomes.items():
            device = dict(cpp='cpu', triton='cuda')[name]
            table[name] = table[name]._replace(load=loader(outcome), device=device, check=None)
        monkeypatch.setattr(dispatch, 'BACKENDS', table)
        dispatch.forget()

    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    yield replace
    monkeypatch.undo()
    dispatch.forget()


# What both can take: (device, dtype, k, dilation) -> backend
BOTH = [
    (('cpu', FLOAT, 3, 1), 'cpp'), (('cpu', BF16, 1, 1), 'cpp'), (('cpu', torch.float64, 7, 1), 'cpp'),
    (('cpu', HALF, 3, 1), 'reference'), (('cpu', FLOAT, 9, 1), 'reference'), (('cpu', FLOAT, 3, 2), 'reference'),
    (('cuda', FLOAT, 3, 1), 'triton'), (('cuda', HALF, 5, 1), 'triton'), (('cuda', BF16, 7, 1), 'triton'),
    (('cuda', torch.float64, 3, 1), 'reference'), (('cuda', HALF, 11, 1), 'reference'),
    (('cuda', HALF, 3, 2), 'reference'), (('mps', FLOAT, 3, 1), 'reference'), (('meta', FLOAT, 3, 1), 'reference'),
]  # fmt: skip


@pytest.mark.parametrize('call, name', BOTH, ids=str)
def test_auto_takes_what_fits(call, name, pretend):
    pretend(cpp='AVX', triton='Triton 3')
    assert dispatch.choose('auto', *call) == name
    assert dispatch.choose('reference', *call) == 'reference'


@pytest.mark.parametrize('error', [ImportError('it was not built'), OSError('undefined symbol: _ZN3c10')], ids=repr)
def test_auto_falls_back_and_the_report_says_why(error, pretend):
    pretend(cpp=error, triton=ImportError('no Triton'))
    assert all(dispatch.choose('auto', *call) == 'reference' for call, _ in BOTH)
    report = backend_report()
    assert report['cpp'] == f'not available: {error}' and report['triton'] == 'not available: no Triton'
    assert report['reference'].startswith('available')
    pretend(cpp='AVX-3', triton=ImportError('no Triton'))
    assert backend_report()['cpp'].startswith('available: cpu, float32') and 'AVX-3' in backend_report()['cpp']


def test_other_errors_of_a_loader_are_not_hidden(pretend):
    """A mistake in a backend is not taken for its absence."""
    pretend(cpp=AttributeError('a mistake'))
    with pytest.raises(AttributeError, match='a mistake'):
        dispatch.choose('auto', 'cpu', FLOAT, 3, 1)


@pytest.mark.parametrize('choice, call, reason', [
    ('cpp', ('cuda', FLOAT, 3, 1), 'it is for cpu tensors, the input is on cuda'),
    ('triton', ('cpu', FLOAT, 3, 1), 'it is for cuda tensors, the input is on cpu'),
    ('cpp', ('cpu', HALF, 3, 1), 'torch.float64, the input is torch.float16'),
    ('triton', ('cuda', torch.float64, 3, 1), 'the input is torch.float64'),
    ('cpp', ('cpu', FLOAT, 9, 1), 'k=9, dilation=1'),
    ('cpp', ('cpu', FLOAT, 3, 2), 'k=3, dilation=2'),
])  # fmt: skip
def test_an_explicit_choice_that_does_not_fit_raises(choice, call, reason, pretend):
    pretend(cpp='AVX', triton='Triton 3')
    with pytest.raises(dispatch.BackendError, match=f'BNET_MM_BACKEND={choice}, but .*{reason}'):
        dispatch.choose(choice, *call)


@pytest.mark.parametrize('name, device', [('cpp', 'cpu'), ('triton', 'cuda')])
def test_an_explicit_choice_that_cannot_be_loaded_raises(name, device, pretend):
    pretend(**{name: OSError('undefined symbol')})
    with pytest.raises(dispatch.BackendError, match=f'BNET_MM_BACKEND={name}, but .*: undefined symbol'):
        dispatch.choose(name, device, FLOAT, 3, 1)


@pytest.mark.parametrize('choice', ['gpu', '', 'CPP', 'auto '])
def test_an_unknown_choice_names_the_known(choice, monkeypatch):
    monkeypatch.setenv('BNET_MM_BACKEND', choice)
    layer = BNET(2)
    for call in (lambda: select_backend(X, 3), lambda: layer(X), lambda: bnet(X, *[torch.ones(2)] * 2, *layer_taps())):
        with pytest.raises(ValueError, match='BNET_MM_BACKEND must be auto, reference, cpp or triton, got ') as caught:
            call()
        assert repr(choice) in str(caught.value)


def layer_taps():
    return torch.ones(2, 1, 3, 3), torch.ones(2)


def test_the_variable_counts_at_each_call(pretend, monkeypatch):
    pretend(cpp='AVX')
    assert select_backend(X, 3) == 'cpp'
    for value, name in [('reference', 'reference'), ('cpp', 'cpp'), ('auto', 'cpp')]:
        monkeypatch.setenv('BNET_MM_BACKEND', value)
        assert select_backend(X, 3) == describe_backend(X, 3) == name


def test_empty_maps_and_traces_run_on_the_reference(pretend, monkeypatch):
    pretend(cpp='AVX')
    assert select_backend(X, 3) == 'cpp'
    assert select_backend(X[:0], 3) == 'reference'
    names = []
    torch.jit.trace(lambda x: names.append(select_backend(x, 3)) or x + 1, X, check_trace=False)
    assert names == ['reference']


def test_repr_tells_the_backend(pretend, monkeypatch):
    pretend(cpp='AVX', triton=ImportError('none'))
    assert 'backend=cpp' in repr(BNET(2)) and 'backend=cpp' in repr(BNET(2, 7, dtype=BF16))
    for layer in (BNET(2, 9), BNET(2, dilation=2), BNET(2, dtype=HALF), BNET(2, device='meta')):
        assert 'backend=reference' in repr(layer)
    monkeypatch.setenv('BNET_MM_BACKEND', 'triton')
    assert 'backend=none (BNET_MM_BACKEND=triton cannot run here)' in repr(BNET(2))
    monkeypatch.setenv('BNET_MM_BACKEND', 'nonsense')
    assert 'backend=none (BNET_MM_BACKEND=nonsense cannot run here)' in repr(BNET(2))


@pytest.mark.parametrize('options, dtype', [(dict(k=9), FLOAT), (dict(k=3, dilation=2), FLOAT), (dict(k=3), HALF)])
def test_what_no_kernel_takes(options, dtype, monkeypatch):
    """Runs in auto, and raises where the kernels were asked for."""
    layer = BNET(2, dtype=dtype, **options).eval()
    x = torch.randn(2, 2, 9, 9).to(dtype)
    taps = layer.bnconv.weight.detach(), layer.bnconv.bias.detach()
    arguments = (x, torch.zeros(2), torch.ones(2), *taps, None, False, options.get('dilation', 1))
    assert layer(x).shape == bnet(*arguments).shape == x.shape
    monkeypatch.setenv('BNET_MM_BACKEND', 'cpp')
    for call in (lambda: layer(x), lambda: bnet(*arguments)):
        with pytest.raises(dispatch.BackendError, match='BNET_MM_BACKEND=cpp, but this backend cannot run here'):
            call()


# --- A package without its extension, or with one that cannot be loaded


CODE = """
import sys
sys.modules['triton'] = None  # an import raises ImportError
# The finder of an editable installation would find the extension in the checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if not finder.__module__.startswith('__editable__')]
import torch, bnet_mm
from bnet_mm import BNET
from bnet_mm.ops import backend_report
from bnet_mm.ops.bnet import bnet, moments
assert bnet_mm.__file__.startswith({folder!r}), bnet_mm.__file__
report = backend_report()
assert report['cpp'].startswith('not available: ') and {reason!r} in report['cpp'], report
assert report['triton'].startswith('not available: '), report
x = torch.randn(2, 4, 5, 6, requires_grad=True)
for norm in ('BN', 'SyncBN', 'IN', 'SN', dict(type='GN', num_groups=2)):
    layer = BNET(4, 3, norm=norm)
    assert 'backend=reference' in repr(layer)
    layer(x).square().sum().backward()
    assert layer.eval()(x).shape == x.shape and layer.bnconv.weight.grad.any()
same, mean, var = moments(x, True)
bnet(same, mean, (var + 1e-5).rsqrt(), layer.bnconv.weight, layer.bnconv.bias, relu=True).sum().backward()
import os
os.environ['BNET_MM_BACKEND'] = 'cpp'
try:
    layer(x)
except RuntimeError as error:
    assert type(error).__name__ == 'BackendError' and {reason!r} in str(error), error
else:
    raise AssertionError('no error')
"""


@pytest.mark.parametrize('state, reason', [('absent', 'the C++ extension was not built'), ('broken', 'too short')])
def test_package_without_a_working_extension(state, reason, tmp_path):
    """Without triton, too: everything runs on torch's own operators, and the report tells why."""
    binaries = shutil.ignore_patterns('_cpu.*', '__pycache__')
    folder = shutil.copytree(Path(bnet_mm.__file__).parent, tmp_path / 'bnet_mm', ignore=binaries)
    if state == 'broken':
        (folder / f'_cpu{sysconfig.get_config_var("EXT_SUFFIX")}').write_bytes(b'\x7fELF')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    environment.pop('BNET_MM_BACKEND', None)
    code = CODE.format(folder=str(tmp_path), reason=reason)
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
