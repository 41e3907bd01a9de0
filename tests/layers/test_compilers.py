"""TorchScript and torch.compile: the same values, or one sentence."""

import pytest
import torch
from torch import nn

import bnet_mm
from bnet_mm import BNET, CBN, BNConv, FReLU, SN1d, SN2d, SN3d, SyncSN


class Net(nn.Module):
    """Two CBN layers, with other operations in the graph before and between them."""

    def __init__(self, norm):
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 8, 3), norm(8)

    def forward(self, x):
        x = self.norm1(self.conv1(x * 1.5)).relu()
        return self.norm2(self.conv2(x * x.sigmoid())).relu()


@pytest.mark.parametrize('norm', [CBN, lambda width: BNET(width, norm='CBN')])
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_cbn_in_a_compiled_network(norm, backend):
    """Outputs, gradients and history over four iterations, of which the later ones use the earlier ones' slopes."""
    net, twin = Net(norm), Net(norm)
    twin.load_state_dict(net.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend=backend)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, twin)]
    for _ in range(4):
        x = torch.randn(4, 3, 10, 10)
        outputs = [net(x), compiled(x)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for y, optimizer in zip(outputs, optimizers):
            optimizer.zero_grad()
            (y.square() * torch.linspace(0, 1, y.numel()).view_as(y)).mean().backward()
        for one, two in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-6)
        [optimizer.step() for optimizer in optimizers]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('norm', [CBN, lambda width: BNET(width, norm='CBN')])
def test_cbn_in_evaluation_is_part_of_the_graph(norm):
    net, x = Net(norm).eval(), torch.randn(2, 3, 10, 10)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, backend='eager', fullgraph=True)(x), net(x))
    torch.testing.assert_close(torch.export.export(net, (x,), strict=True).module()(x), net(x))


LAYERS = [
    BNET(4), BNET(4, norm=dict(type='GN', num_groups=2)), BNET(4, norm='SN'), BNET(4, norm='CBN'), SN1d(4), SN2d(4),
    SN3d(4), SyncSN(4), CBN(4), BNET(4).bnconv,
]  # fmt: skip


@pytest.mark.parametrize('layer', LAYERS, ids=lambda layer: type(layer).__name__)
def test_script_says_what_to_use(layer):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer).eval()
    children = list(net.children())
    with pytest.raises(RuntimeError, match=f'^{type(layer).__name__}: torch.jit.script cannot .*trace') as caught:
        torch.jit.script(net)
    assert '\n' not in str(caught.value) and list(net.children()) == children


@pytest.mark.parametrize('layer', [FReLU(4), BNConv(4)], ids=lambda layer: type(layer).__name__)
def test_what_scripts(layer):
    x = torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(torch.jit.script(layer.eval())(x), layer(x))


def test_what_the_sentence_names():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4, k=5)).eval()
    nn.init.normal_(net[1].bnconv.weight)
    x = torch.randn(1, 3, 9, 9)
    folded = bnet_mm.fold(net, inplace=False, conv2d=True).model
    for other in (torch.jit.trace(net, x), torch.export.export(net, (x,)).module(), torch.jit.script(folded)):
        torch.testing.assert_close(other(x), net(x), rtol=1e-4, atol=1e-4)
