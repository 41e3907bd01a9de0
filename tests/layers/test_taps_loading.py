"""A BNET layer whose taps are pruned, reparametrised or sharded saves and loads as any layer does."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.utils import parametrizations, parametrize, prune

from bnet_mm import BNET
from bnet_mm.checkpoint.layouts import CheckpointError
from helpers import reference

CHANGES = {
    'prune': lambda bnconv: prune.l1_unstructured(bnconv, 'weight', 0.3),
    'weight_norm': parametrizations.weight_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'old weight_norm': torch.nn.utils.weight_norm,
    'old spectral_norm': torch.nn.utils.spectral_norm,
}


def block(norm='BN'):
    return reference.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), BNET(4, k=3, norm=norm)))


@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('norm', ['BN', 'SN', 'CBN', dict(type='GN', num_groups=2)], ids=str)
@pytest.mark.parametrize('change', CHANGES)
def test_own_checkpoint_loads(change, norm, strict):
    nets = [block(norm), block(norm)]
    for net in nets:
        CHANGES[change](net[1].bnconv)
        net.eval()
    nets[1].load_state_dict(nets[0].state_dict(), strict=strict)
    x = torch.randn(2, 3, 8, 9)
    assert torch.equal(nets[1](x), nets[0](x))


@pytest.mark.parametrize('change', CHANGES)
def test_changed_taps_are_used(change):
    """In the kernels' path as where the two modules run."""
    net = block().eval()
    CHANGES[change](net[1].bnconv)
    x = torch.randn(2, 3, 8, 9)
    want = net[1].bnconv(net[1].norm(net[0](x)))
    torch.testing.assert_close(net(x), want, rtol=1e-4, atol=1e-5)
    net(x).square().sum().backward()
    gradients = [parameter.grad for parameter in net[1].bnconv.parameters()]
    assert all(gradient is not None and gradient.any() for gradient in gradients)


def test_layer_itself_has_nothing_to_prune():
    """One sentence, not torch's 'cannot assign' or KeyError."""
    layer = BNET(4)
    with pytest.raises(ValueError, match='BNET: it has no parameter of its own .* its taps are bnconv.weight'):
        prune.l1_unstructured(layer, 'weight', 0.3)
    with pytest.raises(ValueError, match='BNET: it has no parameter of its own .* its taps are bnconv.weight'):
        layer.weight = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="'weight'"):
        parametrize.register_parametrization(layer, 'weight', nn.Identity())


def test_global_pruning_of_the_taps():
    net = block()
    prune.global_unstructured([(net[0], 'weight'), (net[1].bnconv, 'weight')], prune.L1Unstructured, amount=0.5)
    zeros = sum((module.weight == 0).sum() for module in (net[0], net[1].bnconv))
    assert zeros == (net[0].weight.numel() + net[1].bnconv.weight.numel() + 1) // 2
    prune.remove(net[1].bnconv, 'weight')
    assert set(block()[1].state_dict()) == set(net[1].state_dict())


def test_batch_norm_checkpoint_into_pruned_taps_is_refused():
    net = block()
    prune.l1_unstructured(net[1].bnconv, 'weight', 0.3)
    bn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(CheckpointError, match='no 1.bnconv.weight_orig, 1.bnconv.weight_mask'):
        net.load_state_dict(bn.state_dict())


@pytest.mark.skipif(not hasattr(torch.distributed, 'fsdp'), reason='needs FSDP2')
@pytest.mark.parametrize('full', ['BN', 'BNET'])
def test_full_state_dict_into_a_sharded_model(full, process_group):
    """FSDP2 merges the sharded model's own entries into the full state dict, so that both layouts are there."""
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        pytest.skip('torch has no fully_shard')
    if not hasattr(torch.cpu.Stream, 'record_event'):
        pytest.skip("this torch's fully_shard does not run on a CPU")
    bn = reference.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    source = bn if full == 'BN' else block()
    net = block()
    mesh = torch.distributed.device_mesh.init_device_mesh('cpu', (1,))
    fully_shard(net, mesh=mesh)
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(net, copy.deepcopy(source.state_dict()), options=options)
    x = torch.randn(2, 3, 8, 9)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-5)


def test_ambiguous_file_is_refused():
    net = block()
    state = net.state_dict() | {'1.running_mean': torch.zeros(4)}
    state['1.norm.running_mean'] = torch.ones(4)
    with pytest.raises(CheckpointError, match='holds 1.norm.running_mean twice'):
        net.load_state_dict(state)
