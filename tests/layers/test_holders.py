"""What the module that holds a layer does: official names, refusals, the convolution before CBN and FReLU."""

import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from torch import nn

from bnet_mm import BNET, CBN
from bnet_mm.checkpoint.layouts import CheckpointError
from helpers import official_layouts as official
from helpers.checkpoints import WAYS, WIDTH, backbone_cfg, by_mmengine, save

pytestmark = pytest.mark.usefixtures('mmdet_scope')


def test_frelu_in_act_cfg():
    """The host tells an activation no channels; they come from the convolution in the same module."""
    mmcv = pytest.importorskip('mmcv.cnn')
    module = mmcv.ConvModule(3, 5, 3, norm_cfg=dict(type='BN'), act_cfg=dict(type='FReLU'))
    assert module.activate.conv.weight.shape == (5, 1, 3, 3)
    assert any(name == 'activate.bn.weight' for name, _ in module.named_parameters())
    x = torch.randn(2, 3, 6, 6)
    before = module.bn.eval()(module.conv(x))
    torch.testing.assert_close(module(x), torch.maximum(before, module.activate.bn(module.activate.conv(before))))


def test_an_explicit_choice_stays():
    """follow() wins over what is registered, also when hosts put the layer into its place again."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), CBN(4))
    assert net[2]._convolution[0] is net[1]
    net[2].follow(net[0])
    net.add_module('2', net[2])
    assert net[2]._convolution[0] is net[0]
    nn.SyncBatchNorm.convert_sync_batchnorm(enhanced := nn.Sequential(nn.Conv2d(3, 4, 1), BNET(4, norm='CBN')))
    assert type(enhanced[1].norm) is CBN


@pytest.mark.parametrize('twin', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_load_official_checkpoints_too(twin):
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    model = twin(MODELS.build(backbone_cfg(k=5)))
    left = model.load_state_dict(checkpoint['state_dict'], strict=False)
    assert left.missing_keys == [] and left.unexpected_keys == ['fc.weight', 'fc.bias']


@pytest.mark.parametrize('lost', ['weight', 'bias', 'running_mean', 'running_var', None])
@pytest.mark.parametrize('way', WAYS)
def test_missing_norm_stops_loading(tmp_path, way, lost):
    """The convolution before it is there and the BNET layer, or a part of it, is not."""
    state_dict = MODELS.build(backbone_cfg(bnet=False)).state_dict()
    gone = [key for key in state_dict if key.startswith('layer2.1.bn3.') and (lost is None or key.endswith(lost))]
    for key in gone:
        del state_dict[key]
    path = save(dict(state_dict=state_dict), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError) as error:
        way(backbone_cfg(), path)
    for name in ('layer2.1.conv3.weight', 'layer2.1.bn3.weight', 'layer2.1.bn3.running_mean', 'layer2.1.bnet3.*'):
        assert name in str(error.value)


@pytest.mark.parametrize('way', WAYS)
def test_checkpoint_of_other_norms_stops_loading(tmp_path, way):
    """Every convolution fits and no norm does: what mmengine would only log."""
    other = MODELS.build(backbone_cfg(bnet=False, norm_cfg=dict(type='GN', num_groups=4)))
    path = save(dict(state_dict=other.state_dict()), tmp_path / 'gn.pth')
    with pytest.raises(CheckpointError, match='layer1.0.conv3.weight but not the BNET layer after it, layer1.0.bn3'):
        way(backbone_cfg(), path)


def test_stem_norm_is_checked_even_if_more_is_missing(tmp_path):
    model = MODELS.build(dict(backbone_cfg(bnet=False), norm_cfg=dict(type='BNET', k=3)))
    state_dict = {
        name: value for name, value in model.state_dict().items() if 'layer' not in name and 'bn1' not in name
    }
    assert list(state_dict) == ['conv1.weight']
    with pytest.raises(CheckpointError, match='conv1.weight but not the BNET layer after it, bn1'):
        load_checkpoint(model, save(dict(state_dict=state_dict), tmp_path / 'a.pth'))


def test_norm_before_its_convolution_is_left_to_the_report():
    """Pre-activation order: nothing says that the checkpoint should have had this norm."""
    model = nn.Sequential(BNET(3), nn.Conv2d(3, 4, 1))
    left = model.load_state_dict({}, strict=False)
    assert '0.bnconv.weight' in left.missing_keys and '1.weight' in left.missing_keys


def test_partial_checkpoint_without_the_block_is_only_reported(tmp_path, leftovers):
    """Loading a part of a model (a backbone without its last stage, say) stays possible, as in the host."""
    state_dict = MODELS.build(backbone_cfg(bnet=False)).state_dict()
    path = save(
        dict(state_dict={key: value for key, value in state_dict.items() if not key.startswith('layer4')}),
        tmp_path / 'a.pth',
    )
    model = by_mmengine(backbone_cfg(), path)
    assert torch.equal(model.layer3[0].conv1.weight, state_dict['layer3.0.conv1.weight'])
    assert len(leftovers()) == 1 and 'layer4.2.bn3.bnconv.weight' in leftovers()[0]


def test_same_tensor_in_two_layouts_is_an_error():
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    model = MODELS.build(backbone_cfg(k=5))
    state_dict = dict(checkpoint['state_dict'])
    state_dict['layer1.0.bn3.bnconv.weight'] = state_dict['layer1.0.bnet3.bnconv.weight']
    with pytest.raises(CheckpointError, match='layer1.0.bn3.bnconv.weight twice'):
        model.load_state_dict(state_dict, strict=False)


def test_loading_leaves_the_callers_state_dict_alone():
    checkpoint = official.imagenet_checkpoint(50, 5, seed=1, width=WIDTH)
    before = copy.copy(checkpoint['state_dict'])
    MODELS.build(backbone_cfg(k=5)).load_state_dict(checkpoint['state_dict'], strict=False)
    assert list(checkpoint['state_dict']) == list(before)
