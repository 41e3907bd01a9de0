"""What importing bnet_mm changes, once, and what is left of it where mmengine or torch lacks what it needs."""

import json

import mmengine.hub
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, WEIGHT_INITIALIZERS
from mmengine.runner import CheckpointLoader

from bnet_mm import host
from bnet_mm.host.pretrained import CheckedPretrainedInit
from helpers.tools import python


def changed_places():
    hooks = torch.nn.modules.module._global_module_registration_hooks
    return [
        dict(CheckpointLoader._schemes), CheckpointLoader.load_checkpoint, Config._get_cfg_path,
        mmengine.hub.get_config, mmengine.hub.hub.get_config, list(hooks.items()),
        *(dict(registry.module_dict) for registry in (MODELS, HOOKS, WEIGHT_INITIALIZERS)),
    ]  # fmt: skip


def test_a_second_time_changes_nothing(recwarn):
    before = changed_places()
    assert WEIGHT_INITIALIZERS.get('Pretrained') is CheckedPretrainedInit
    host.install()
    host.install()
    assert changed_places() == before and not recwarn.list


def test_the_table_has_a_row_for_each_effect():
    rows = [line for line in host.__doc__.splitlines() if line.startswith('|')][2:]
    assert len(rows) == len(host.EFFECTS) and all(row.count(' | ') == 2 for row in rows)
    for name, row in zip(list(host.EFFECTS)[:3], rows):
        assert name in row.split(' | ')[0]


# What is taken away before the import -> the effect that cannot be had without it, if any is lost. torch itself needs
# the last two, so that they are put back after the import.
TAKEN = {
    'mmengine.runner.checkpoint.CheckpointLoader._schemes': 'CheckpointLoader',
    'mmengine.runner.checkpoint.CheckpointLoader.register_scheme': 'CheckpointLoader',
    'mmengine.model.PretrainedInit': 'Pretrained',
    'mmengine.config.Config._get_cfg_path': 'bnet_mm::',
    'mmengine.hub.get_config': 'bnet_mm::',
    'torch.nn.modules.module.register_module_module_registration_hook': 'holders',
    'torch._C._are_functorch_transforms_active': None,
    'torch._C._current_graph_task_id': None,
}
# Each in a fork of one process, for the import of torch and mmengine takes most of the time.
SCRIPT = """
import json, os, sys, traceback, warnings
import mmengine.config, mmengine.hub, mmengine.model, mmengine.runner.checkpoint, torch

def without(path):
    *parents, name = path.split('.')
    owner = sys.modules[parents[0]]
    for parent in parents[1:]:
        owner = getattr(owner, parent)
    taken = owner.__dict__[name]
    delattr(owner, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        import bnet_mm
    if owner is torch._C:
        setattr(owner, name, taken)
    return [str(warning.message) for warning in caught if 'bnet_mm' in str(warning.message)]

def layer_works():
    from bnet_mm import BNET
    from helpers import reference
    for training in (True, False):
        layer = reference.randomise(BNET(8)).double().train(training)
        x = torch.randn(2, 8, 5, 6, dtype=torch.float64)
        mean, var = reference.batch_statistics(x) if training else (layer.norm.running_mean, layer.norm.running_var)
        want = reference.bnet(x, layer.bnconv.weight, layer.bnconv.bias, mean, var)
        torch.testing.assert_close(layer(x), want, rtol=1e-10, atol=1e-10)
        layer(x).sum().backward()

def read():
    from bnet_mm.checkpoint.layouts import CheckpointError
    path, messages = f'{sys.argv[2]}/a.pth', []
    torch.save(dict(state_dict=dict(weight=torch.ones(1))), path)
    for load in (mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint,
                 lambda path: mmengine.runner.checkpoint.load_checkpoint(torch.nn.Linear(1, 1), path)):
        try:
            load(path)
        except CheckpointError as error:
            messages.append(str(error))
    return messages

def load_official():
    from bnet_mm import BNET
    net = torch.nn.Sequential()
    net.add_module('bn3', BNET(4))
    return net.load_state_dict({'bnet3.bnconv.bias': torch.ones(4)}, strict=False).unexpected_keys

for number, path in enumerate(json.loads(sys.argv[1])):
    if os.fork() == 0:
        found = {}
        try:
            found['warned'] = without(path)
            layer_works()
            found.update(read=read(), unexpected=load_official())
        except Exception:
            found['error'] = traceback.format_exc()
        with open(f'{sys.argv[2]}/{number}.json', 'w') as file:
            json.dump(found, file)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('taken')
    done = python(SCRIPT, json.dumps(list(TAKEN)), folder, PYTHONWARNINGS='ignore')
    assert done.returncode == 0, done.stderr
    return {path: json.loads((folder / f'{i}.json').read_text()) for i, path in enumerate(TAKEN)}


@pytest.mark.parametrize('path, lost', TAKEN.items(), ids=TAKEN)
def test_without_a_name_that_is_needed(outcomes, path, lost):
    """One warning names what is left out, the layer works, and no file is read unsafely."""
    found = outcomes[path]
    assert 'error' not in found, found['error']
    assert len(found['warned']) == (lost is not None)
    for text in found['warned']:
        assert f'cannot install {lost} in this mmengine and torch' in text and path.rpartition('.')[2] in text
        assert 'see help(bnet_mm.host)' in text
    assert found['unexpected'] == (['bnet3.bnconv.bias'] if lost == 'holders' else [])
    assert len(found['read']) == (2 if lost == 'CheckpointLoader' else 0)
    for text in found['read']:
        assert text.startswith('checkpoint ') and 'a.pth was not read: bnet_mm cannot make this version' in text
