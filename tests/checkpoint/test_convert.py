"""Conversion of state dicts; tools/test_convert_checkpoint.py has whole checkpoints."""

import pytest
import torch

from bnet_mm.checkpoint.convert import convert_file, convert_state_dict, write_backbone
from bnet_mm.checkpoint.layouts import CheckpointError

OLD = {'bnconv3.weight': 0.0, 'bnconv3.bias': 1.0, 'bn3.running_mean': 2.0, 'bn3.running_var': 3.0}
NEW = {'bnet3.bnconv.weight': 0.0, 'bnet3.bnconv.bias': 1.0, 'bnet3.running_mean': 2.0, 'bnet3.running_var': 3.0}
OURS = {'bn3.bnconv.weight': 0.0, 'bn3.bnconv.bias': 1.0, 'bn3.norm.running_mean': 2.0, 'bn3.norm.running_var': 3.0}


def tensors(numbers, prefix=''):
    return {prefix + name: torch.tensor([value]) for name, value in numbers.items()}


@pytest.mark.parametrize('official', [OLD, NEW], ids=['old', 'new'])
@pytest.mark.parametrize('prefix', ['', 'backbone.layer1.0.'])
def test_official_keys_become_ours(official, prefix):
    others = {f'{prefix}conv3.weight': torch.zeros(1), f'{prefix}bn2.running_mean': torch.zeros(1)}
    result = convert_state_dict({**others, **tensors(official, prefix)})
    assert result.unmatched == [] and result.kept == list(others)
    assert result.renamed == dict(zip(tensors(official, prefix), tensors(OURS, prefix)))
    assert result.state_dict == {**others, **tensors(OURS, prefix)}


@pytest.mark.parametrize('lost', list(NEW))
def test_what_is_missing_is_named(lost):
    source = tensors(NEW)
    del source[lost]
    name = dict(zip(NEW, OURS))[lost]
    assert convert_state_dict(source).unmatched == [f'{name} is missing']


def test_strange_keys_are_named():
    result = convert_state_dict(tensors({**NEW, 'bnet3.gamma': 4.0}))
    assert result.unmatched == ['bnet3.gamma is no part of a BNET layer']


def test_files(tmp_path):
    source, target = tmp_path / 'in.pth', tmp_path / 'out.pth'
    torch.save(dict(state_dict=tensors(OLD), meta=dict(epoch=3), optimizer={}), source)
    result, left_out = convert_file(str(source), str(target))
    assert len(result.renamed) == 4 and left_out == ['optimizer']
    written = torch.load(target, weights_only=True)
    assert written == dict(meta=dict(epoch=3, converted_from='in.pth'), state_dict=tensors(OURS))
    with pytest.raises(FileExistsError):
        convert_file(str(source), str(target))
    torch.save(tensors({name: value for name, value in OLD.items() if 'var' not in name}), source)
    convert_file(str(source), str(tmp_path / 'less.pth'))
    assert sorted(path.name for path in tmp_path.iterdir()) == ['in.pth', 'out.pth']


def test_backbone(tmp_path):
    source, target = tmp_path / 'in.pth', tmp_path / 'out.pth'
    torch.save(dict(state_dict=tensors({'backbone.a': 1.0, 'head.b': 2.0, 'backbone.c.d': 3.0})), source)
    assert write_backbone(str(source), str(target)) == (['a', 'c.d'], ['head.b'])
    assert torch.load(target, weights_only=True)['state_dict'] == tensors({'a': 1.0, 'c.d': 3.0})
    with pytest.raises(CheckpointError, match="no tensor below 'neck.'"):
        write_backbone(str(source), str(tmp_path / 'other.pth'), prefix='neck.')
