"""What users and tools do that look for norms by class: the documented lines, beside what happens without them."""

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.norm import is_norm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnet_mm import BNET

KINDS = ['BN', 'SyncBN', dict(type='GN', num_groups=2), 'IN', 'SN', 'CBN']


def net(kind='BN'):
    torch.manual_seed(0)
    model = nn.Sequential(
        ConvModule(3, 4, 3, norm_cfg=dict(type='BNET', norm=kind), inplace=False), ConvModule(4, 4, 3)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize('kind', KINDS)
def test_freezing_by_class(kind):
    """A loop over _BatchNorm stops the statistics only; with BNET in the tuple it stops the taps too."""
    model = net(kind).train()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, BNET)):
            module.eval()
            module.requires_grad_(False)
    layer = model[0].bn
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == len(list(model.parameters())) - len(list(layer.parameters()))
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 9, 9)).square().mean().backward()
        optimizer.step()
    assert not layer.training and not layer.norm.training
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
def test_the_layer_whose_output_a_cam_tool_shall_take(kind):
    """mmpretrain's vis_cam takes the last norm by is_norm, the one inside; --target-layers names the layer itself."""
    model = net(kind).eval()
    names = [name for name, module in model.named_modules() if is_norm(module)]
    assert all(name.startswith('0.bn.norm') for name in names)
    seen = {}
    for name in ('0.bn', '0.bn.norm'):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: output})
        )
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    output = model[0](x)
    torch.testing.assert_close(seen['0.bn'].relu(), output)
    assert not torch.allclose(seen['0.bn.norm'], seen['0.bn'])
    (gradient,) = torch.autograd.grad(output.sum(), seen['0.bn'])  # what GradCAM multiplies with
    torch.testing.assert_close(gradient, (seen['0.bn'] > 0).to(gradient.dtype))


def test_heads_that_initialise_norms_by_is_norm():
    """YOLOF, RTMDet, YOLOv3, the dilated encoder: constant_init of every norm leaves the function as it is."""
    from mmengine.model import constant_init

    model = net().eval()
    x = torch.randn(1, 3, 9, 9)
    want = model(x)
    for module in model.modules():
        if is_norm(module):
            constant_init(module, 1)
    torch.testing.assert_close(model(x), want)
