"""Distributed jobs without GPU; tools/test_scripts.py runs some."""

import pytest
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from bnet_mm import BNET
from bnet_mm.cli import UserError
from bnet_mm.engine.processes import CPUDistributedDataParallel, start_process_group
from bnet_mm.layers.sync_batch_norm import AffineSyncBatchNorm
from helpers import reference


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus): pretend to have so many; gives the backends of the process groups that were started."""
    started = []

    def pretend(gpus):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
        monkeypatch.setattr(dist, 'init_process_group', started.append)
        return started

    return pretend


@pytest.mark.parametrize('gpus, launcher', [(0, 'none'), (2, 'none'), (2, 'pytorch'), (2, 'slurm')])
def test_where_there_is_nothing_to_do(machine, monkeypatch, gpus, launcher):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    cfg = Config(dict(launcher=launcher))
    assert machine(gpus) == []
    start_process_group(cfg)
    assert machine(gpus) == [] and cfg.to_dict() == dict(launcher=launcher)


def test_a_group_for_cpus(machine):
    cfg = Config(dict(launcher='pytorch', find_unused_parameters=True, model_wrapper_cfg=dict(bucket_cap_mb=7)))
    started = machine(0)
    start_process_group(cfg)
    assert started == ['gloo']
    assert cfg.model_wrapper_cfg == dict(
        type='CPUDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=True, bucket_cap_mb=7,
        device_ids=None,
    )  # fmt: skip
    assert MODEL_WRAPPERS.get('CPUDistributedDataParallel') is CPUDistributedDataParallel


@pytest.mark.parametrize('strategy, wrapper', [
    (None, dict(type='CPUDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=False,
                device_ids=None)),
    (dict(type='FSDPStrategy', model_wrapper=dict(sharding_strategy='NO_SHARD')),
     dict(type='MMFullyShardedDataParallel', device_id='cpu', sharding_strategy='NO_SHARD')),
    (dict(type='DeepSpeedStrategy'), None),
])  # fmt: skip
def test_strategies_wrap_the_model_by_themselves(machine, strategy, wrapper):
    cfg = Config(dict(launcher='pytorch', runner_type='FlexibleRunner', strategy=strategy))
    machine(0)
    start_process_group(cfg)
    assert cfg.strategy.get('model_wrapper') == wrapper
    assert cfg.strategy.type == (strategy or dict(type='DDPStrategy'))['type']


@pytest.mark.parametrize('gpus, launcher, message', [
    (1, 'pytorch', '4 GPUs asked for, this machine has 1'),
    (0, 'slurm', '--launcher slurm needs CUDA'), (0, 'mpi', '--launcher mpi needs CUDA'),
])  # fmt: skip
def test_what_cannot_be_started(machine, monkeypatch, gpus, launcher, message):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    started = machine(gpus)
    with pytest.raises(UserError, match=message):
        start_process_group(Config(dict(launcher=launcher)))
    assert started == []


def test_synchronised_norms_of_others_are_replaced(tmp_path):
    """In training they are torch's batch norm, which does not run synchronised without a GPU."""
    net = reference.randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), BNET(4, norm='SyncBN')))
    plain = nn.BatchNorm2d(4)
    plain.load_state_dict(net[1].state_dict())
    keys, ours = list(net.state_dict()), net[2]
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    try:
        wrapped = CPUDistributedDataParallel(net, device_ids=None, broadcast_buffers=False)
        x = torch.randn(2, 3, 5, 6)
        assert type(net[1]) is AffineSyncBatchNorm and net[2] is ours and list(net.state_dict()) == keys
        torch.testing.assert_close(wrapped.module[1](net[0](x)), plain(net[0](x)))
        torch.testing.assert_close(net[1].running_var, plain.running_var)
    finally:
        dist.destroy_process_group()
