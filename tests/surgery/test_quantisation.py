"""Post-training quantisation of BNET and of a folded BNET, beside that of batch norm and a depthwise convolution."""

import copy
import warnings

import pytest
import torch
from torch import nn

import bnet_mm
from bnet_mm import BNET
from bnet_mm.layers.bnet import DepthwiseTransform

quantize_fx = pytest.importorskip('torch.ao.quantization.quantize_fx')
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping  # noqa: E402

ENGINE = 'x86'
pytestmark = pytest.mark.skipif(ENGINE not in torch.backends.quantized.supported_engines, reason='no quantised kernels')
IMAGES = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]


class Net(nn.Module):
    """Two convolutions, each with ``norm`` and then, if there is one, ``taps``."""

    def __init__(self, norm, taps=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3), norm(8)
        self.last = nn.Conv2d(8, 4, 1)
        self.taps1, self.taps2 = (taps(), taps()) if taps else (None, None)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = self.relu1(self.taps1(x) if self.taps1 else x)
        x = self.bn2(self.conv2(x))
        return self.last(self.relu2(self.taps2(x) if self.taps2 else x))


@pytest.fixture
def pair():
    """(BN and a depthwise convolution, BNET): the same function."""
    torch.manual_seed(0)
    bn = Net(nn.BatchNorm2d, lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8)).eval()
    ours = Net(BNET).eval()
    for name in ('conv1', 'conv2', 'last'):
        getattr(ours, name).load_state_dict(getattr(bn, name).state_dict())
    with torch.no_grad():
        for i in (1, 2):
            layer, norm, taps = (getattr(net, f'{name}{i}') for net, name in ((ours, 'bn'), (bn, 'bn'), (bn, 'taps')))
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            layer.norm.running_mean.copy_(norm.running_mean)
            layer.norm.running_var.copy_(norm.running_var)
            layer.bnconv.weight.copy_(taps.weight)
            layer.bnconv.bias.copy_(taps.bias)
        torch.testing.assert_close(ours(IMAGES[0]), bn(IMAGES[0]), rtol=1e-4, atol=1e-4)
    return bn, ours


def error(quantised, original):
    with torch.no_grad():
        want = original(IMAGES[0])
        return ((quantised(IMAGES[0]) - want).abs().mean() / want.abs().mean()).item()


def by_fx(net):
    prepared = quantize_fx.prepare_fx(copy.deepcopy(net), get_default_qconfig_mapping(ENGINE), (IMAGES[0],))
    with torch.no_grad():
        for x in IMAGES:
            prepared(x)
    return quantize_fx.convert_fx(prepared)


def integer_convolutions(graph_module):
    """How many convolutions a graph of FX's quantisation computes in integers, as modules or functions."""
    modules = sum(type(m).__module__.startswith('torch.ao.nn.') for m in graph_module.modules())
    return modules + sum('quantized.conv2d' in str(node.target) for node in graph_module.graph.nodes)


def test_fx_quantises_as_bn_and_convolution(pair, capsys):
    bn, ours = pair
    nets = {'BN': bn, 'BNET': ours, 'folded': bnet_mm.fold(ours, inplace=False).model}
    quantised = {name: by_fx(net) for name, net in nets.items()}
    errors = {name: error(net, bn) for name, net in quantised.items()}
    with capsys.disabled():
        print('\nFX:', ', '.join(f'{name} {value:.4f}' for name, value in errors.items()))
    assert {integer_convolutions(net) for net in quantised.values()} == {5}
    assert errors['BNET'] < 1.5 * errors['BN'] and errors['folded'] < 1.1 * errors['BN']


def test_fx_quantisation_aware_training(pair):
    ours = pair[1].train()
    prepared = quantize_fx.prepare_qat_fx(ours, get_default_qat_qconfig_mapping(ENGINE), (IMAGES[0],))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    losses = []
    for x in IMAGES:
        losses.append(prepared(x).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert error(quantize_fx.convert_fx(copy.deepcopy(prepared).eval()), prepared.eval()) < 0.1


def test_fold_can_leave_torchs_convolutions(pair):
    ours = pair[1]
    folded = bnet_mm.fold(ours, inplace=False, conv2d=True).model
    assert type(folded.bn1) is nn.Conv2d and not any(isinstance(m, DepthwiseTransform) for m in folded.modules())
    assert not folded.bn1.training and [*folded.state_dict()] == [*bnet_mm.fold(ours, inplace=False).model.state_dict()]
    torch.testing.assert_close(folded(IMAGES[0]), ours(IMAGES[0]), rtol=1e-4, atol=1e-4)
    dilated = nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4, k=5, dilation=2)).eval()
    nn.init.normal_(dilated[1].bnconv.weight)
    want, taps = dilated(IMAGES[0]), dilated[1].bnconv.weight
    bnet_mm.fold(dilated, conv2d=True, inputs=(IMAGES[0],))
    assert type(dilated[1]) is nn.Conv2d and dilated[1].weight is taps
    torch.testing.assert_close(dilated(IMAGES[0]), want, rtol=1e-4, atol=1e-4)


def test_pt2e_quantises_as_bn_and_convolution(pair, capsys):
    """torchao's quantisers know convolutions by nn.Conv2d, so the taps stay in float unless fold(conv2d=True)."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pt2e = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e')
        x86 = pytest.importorskip('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer')

    def quantise(net):
        quantiser = x86.X86InductorQuantizer()
        quantiser.set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(torch.export.export(copy.deepcopy(net), (IMAGES[0],)).module(), quantiser)
        for x in IMAGES:
            prepared(x)
        return pt2e.convert_pt2e(prepared)

    bn, ours = pair
    nets = {'BN': bn, 'BNET': ours}
    nets |= {f'folded, {c}': bnet_mm.fold(ours, inplace=False, conv2d=c).model for c in (False, True)}
    with torch.no_grad():
        quantised = {name: quantise(net) for name, net in nets.items()}
    weights = {name: str(net.graph).count('dequantize_per_channel.default') for name, net in quantised.items()}
    assert weights == {'BN': 5, 'BNET': 3, 'folded, False': 3, 'folded, True': 5}
    errors = {name: error(net, bn) for name, net in quantised.items()}
    with capsys.disabled():
        print('\nPT2E:', ', '.join(f'{name} {value:.4f}' for name, value in errors.items()))
    assert all(value < 1.1 * errors['BN'] for value in errors.values())
