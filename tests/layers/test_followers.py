"""CBN and FReLU beside the convolution that they follow: lazy, replaced, shared or parametrized; traced; saved."""

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.utils import prune

from bnet_mm import BNET, CBN, FReLU, SN2d, enhance
from helpers import reference
from helpers.hosts import import_host_models


def image(*shape):
    return torch.randn(*(shape or (2, 3, 8, 9)), requires_grad=True)


def follower(layer):
    return layer.norm if isinstance(layer, BNET) else layer


# --- Lazy modules


@pytest.mark.parametrize('make', [lambda: CBN(4), lambda: BNET(4, norm='CBN'), lambda: FReLU(), lambda: BNET(4)])
def test_lazy_convolution(make):
    net = nn.Sequential(nn.LazyConv2d(4, 3), make())
    for _ in range(2):
        net(image()).sum().backward()
    twin = nn.Sequential(nn.LazyConv2d(4, 3), make())
    twin.load_state_dict(net.state_dict())
    x = image()
    assert torch.equal(twin.eval()(x), net.eval()(x))


def test_lazy_convolution_of_another_width_is_noticed():
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.Conv2d(6, 4, 1), nn.Identity(), CBN(4))
    assert net[3]._convolution == (net[1],)
    net = nn.Sequential(nn.LazyConv2d(6, 3), nn.Flatten(1, 2), nn.Flatten(1), nn.LazyLinear(4), CBN(4))
    assert net[4]._convolution == (net[3],)


def test_enhance_of_a_lazy_model():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    report = enhance(net, k=3, where='all')
    assert list(report.changed) == ['1'] and list(report.kept) == ['3']
    assert net(image()).shape == (2, 4, 4, 5)


# --- Replaced after registration


@pytest.mark.parametrize('make', [lambda: CBN(4), lambda: BNET(4, norm='CBN')])
def test_follows_the_convolution_that_stands_there(make):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), make())
    first = net[0]
    net[0] = nn.Conv2d(3, 4, 3)
    assert follower(net[1])._convolution == (net[0],) != (first,)
    for _ in range(2):
        net(image()).sum().backward()
    chosen = nn.Sequential(nn.Conv2d(3, 4, 3), make())
    follower(chosen[1]).follow(first)
    chosen[0] = nn.Conv2d(3, 4, 3)
    assert follower(chosen[1])._convolution == (first,)  # what the user chose stays


def test_activation_after_it_does_not_disturb():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4), nn.Conv2d(4, 4, 3))
    net[2] = nn.Conv2d(4, 4, 1)
    assert net[1]._convolution == (net[0],)


@pytest.mark.parametrize('head', ['RetinaSepBNHead', 'RTMDetSepBNHead'])
def test_heads_whose_levels_share_convolutions(head):
    import_host_models('mmdet')
    from mmengine.registry import MODELS, DefaultScope

    anchors = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8, 16])
    points = dict(type='MlvlPointGenerator', offset=0, strides=[8, 16])
    generator = dict(anchor_generator=anchors, num_ins=2) if 'Retina' in head else dict(anchor_generator=points)
    loss = dict(loss_bbox=dict(type='GIoULoss'), bbox_coder=dict(type='DistancePointBBoxCoder'))
    if 'Retina' in head:
        loss = {}
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(
            dict(type=f'mmdet.{head}', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=2)
            | dict(norm_cfg=dict(type='CBN'))
            | generator
            | loss
        )
    assert sum(isinstance(module, CBN) for module in built.modules()) == 8
    for _ in range(2):
        maps = [torch.randn(1, 8, size, size, requires_grad=True) for size in (8, 4)]
        sum(y.sum() for level in built(maps) for y in level).backward()


# --- A weight that is computed at every call


def test_parametrized_weight_is_named():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
    torch.nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(RuntimeError, match=r'(?s)CBN: the weight of the convolution .*Conv2d.* is parametrized'):
        net(image())
    net.eval()(image())


@pytest.mark.parametrize('how', ['prune', 'spectral_norm'])
def test_weight_that_a_hook_computes(how):
    """What stands at ``weight`` when the layer runs is what the convolution used."""
    net = reference.randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), CBN(4)))
    if how == 'prune':
        prune.l1_unstructured(net[0], 'weight', 0.3)
    else:
        torch.nn.utils.spectral_norm(net[0])
    for _ in range(3):
        net(image()).square().sum().backward()
        with torch.no_grad():
            net[0].weight_orig.add_(torch.randn_like(net[0].weight_orig) * 0.1)
    assert net[1]._history.any()


# --- The batch size is no number


def test_switchable_norm_traced_in_training_takes_any_batch():
    for layer in (SN2d(4), BNET(4, norm='SN')):
        traced = torch.jit.trace(copy.deepcopy(layer), torch.randn(2, 4, 5, 6), check_trace=False)
        for batch in (2, 5):
            x = torch.randn(batch, 4, 5, 6) * 3 + 1
            torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


def test_switchable_norm_exported_takes_any_batch():
    for layer in (SN2d(4), BNET(4, norm='SN')):
        dynamic = ({0: torch.export.Dim('batch', min=2, max=64)},)
        program = torch.export.export(layer, (torch.randn(3, 4, 5, 6),), dynamic_shapes=dynamic, strict=False)
        x = torch.randn(7, 4, 5, 6) * 3 + 1
        torch.testing.assert_close(program.module()(x), copy.deepcopy(layer)(x), rtol=1e-4, atol=1e-5)


def test_cross_iteration_norm_refuses_to_be_traced_in_training():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4))
    with pytest.raises(RuntimeError, match=r'CBN: no trace or export can keep the history .* eval\(\)'):
        torch.jit.trace(net, image())
    x = image()
    torch.testing.assert_close(torch.jit.trace(net.eval(), x)(x), net(x))


# --- The history in state dicts


def trained(steps=3, **options):
    net = reference.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), CBN(4, **options)))
    for _ in range(steps):
        net(image()).square().sum().backward()
    return net


def test_keys_and_shapes_never_change():
    shapes = [{key: value.shape for key, value in trained(steps).state_dict().items()} for steps in (0, 1, 5)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]['1._extra_state'] == (3, 1 + 4 + 4 + 3 * 4 * 3 * 3 * 3)


def test_distributed_checkpoint_keeps_the_history(tmp_path):
    net, fresh = trained(), trained(0)
    dcp.save(get_model_state_dict(net), checkpoint_id=tmp_path / 'dcp', no_dist=True)
    state = get_model_state_dict(fresh)
    dcp.load(state, checkpoint_id=tmp_path / 'dcp', no_dist=True)
    set_model_state_dict(fresh, state)
    assert torch.equal(fresh[1]._history, net[1]._history)
    x = image()
    assert torch.equal(fresh(x), net(x))


def test_history_of_version_01_loads():
    net = trained(2)
    parts = net[1]._unpack(net[1]._history[:2])
    old = {key: value for key, value in net.state_dict().items() if not key.endswith('_extra_state')}
    for name in ('mean', 'var'):
        old[f'1.past_{name}'] = parts[name]
    for name in ('weight', 'mean_slope', 'var_slope'):
        old[f'1.past_{name}'] = parts[name].reshape(2, *net[0].weight.shape)
    fresh = trained(0)
    fresh.load_state_dict(old)
    assert torch.equal(fresh[1]._history, net[1]._history)


def test_history_of_another_weight_is_refused():
    net = nn.Sequential(nn.Conv2d(5, 4, 1), CBN(4))
    state = {key.removeprefix('1.'): value for key, value in trained().state_dict().items() if key.startswith('1.')}
    with pytest.raises(RuntimeError, match=r'CBN: the history in the checkpoint is \(3, 333\).*\(3, 69\)'):
        net[1].load_state_dict(state)


def test_history_survives_pickle_and_weights_only():
    net = trained()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    fresh = trained(0)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh[1]._history, net[1]._history)
