"""Distributed jobs on CPUs, for trials and tests."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from torch import nn

from bnet_mm.cli import UserError
from bnet_mm.layers.normalisers import is_foreign_sync_batch_norm
from bnet_mm.layers.sync_batch_norm import AffineSyncBatchNorm
from bnet_mm.register import register
from bnet_mm.surgery.config import type_name
from bnet_mm.surgery.modules import replace_modules


class CPUDistributedDataParallel(MMDistributedDataParallel):
    """For processes without GPU, where the libraries' synchronised batch norms do not run."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        norms = [norm for norm in module.modules() if is_foreign_sync_batch_norm(norm)]
        replace_modules(module, {norm: AffineSyncBatchNorm.from_host(norm) for norm in norms})
        super().__init__(module, **options)


def start_process_group(cfg: Config) -> None:
    """Make a distributed job run without CUDA (gloo).

    mmengine calls ``torch.cuda.set_device`` before it starts a process group and gives DDP a device id; neither works
    without CUDA, so here the group is started first, which mmengine accepts, and DDP is one for CPUs.
    """
    if cfg.launcher == 'none':
        return
    if torch.cuda.is_available():
        asked, there = int(os.environ.get('LOCAL_WORLD_SIZE', 1)), torch.cuda.device_count()
        if asked > there:
            raise UserError(f'{asked} GPUs asked for, this machine has {there}')
        return
    if cfg.launcher != 'pytorch':
        raise UserError(f'--launcher {cfg.launcher} needs CUDA; without it, use tools/dist_train.sh or dist_test.sh')
    dist.init_process_group('gloo')
    wrapper = dict(
        type='CPUDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, **(cfg.get('model_wrapper_cfg') or {}), 'device_ids': None}
    if cfg.get('runner_type'):
        _wrap_by_strategy(cfg)


def _wrap_by_strategy(cfg: Config) -> None:
    """Of mmengine's FlexibleRunner it is the strategy that wraps the model, and has the options for it."""
    strategy = dict(cfg.get('strategy') or dict(type='DDPStrategy'))
    fully_sharded = dict(type='MMFullyShardedDataParallel', device_id='cpu')
    wrappers = dict(DDPStrategy=cfg.model_wrapper_cfg, FSDPStrategy=fully_sharded)
    if (name := type_name(strategy)) in wrappers:
        strategy['model_wrapper'] = {**wrappers[name], **(strategy.get('model_wrapper') or {})}
    cfg.strategy = strategy


register(__name__)
