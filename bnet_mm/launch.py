"""What the command-line tools share: arguments, config, model, checkpoint, process group, runner, and clear errors."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.model import BaseTTAModel, MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import MODEL_WRAPPERS, MODELS, RUNNERS, DefaultScope
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn

import bnet_mm.compat  # noqa: F401  (mends installed libraries, before anything else imports them)
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from bnet_mm.norms.normalizers import is_foreign_sync_batch_norm
from bnet_mm.norms.sync_batch_norm import SyncBatchNorm, world_size
from bnet_mm.surgery.enhance import replace_modules

# What mmengine reads from a config beside the arguments of its Runner, and what our tools read.
OTHER_KEYS = (
    'activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'find_unused_parameters', 'gpu_ids',
    'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline',
)  # fmt: skip

OUR_TYPES = (
    'BNET', 'BNConv', 'CBN', 'CBNBurnIn', 'FReLU', 'FreezeTransform', 'SN', 'SN1d', 'SN2d', 'SN3d', 'SyncSN',
    'WithBNET',
)  # fmt: skip


class UserError(Exception):
    """Something the user can mend; its text is the whole message."""


@contextmanager
def clear_errors(doing: str) -> Iterator[None]:
    """Turn any error inside into a UserError that says what was being done; BNET_MM_TRACEBACK=1 keeps the traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if os.environ.get('BNET_MM_TRACEBACK') == '1':
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        says_it_all = isinstance(error, (FileNotFoundError, FileExistsError, CheckpointError))
        name = '' if says_it_all else f'{type(error).__name__}: '
        raise UserError(f'{doing}: {name}{text.strip()}') from error


def run_tool(main: Callable[[], None]) -> None:
    """Run ``main()``; a UserError becomes one sentence on stderr (once per machine) and exit code 1."""
    try:
        main()
    except UserError as error:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def common_arguments(description: str) -> argparse.ArgumentParser:
    """The options that training and testing share, as OpenMMLab users know them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default work_dirs/<config name>')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
        help='override config values, for instance model.backbone.bnet.k=7 train_dataloader.batch_size=4',
    )  # fmt: skip
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, merge ``--cfg-options``, ``--work-dir`` and ``--launcher``.

    Raises:
        UserError: For a config that cannot be read, does not import bnet_mm although it needs it, or lacks the place
            that an option names.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    with clear_errors(f'config {args.config} cannot be read'):
        cfg = Config.fromfile(args.config)
    _check_custom_imports(cfg, args.config)
    for key in args.cfg_options:
        _check_option(key, cfg)
    with clear_errors('--cfg-options cannot be merged'):
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    if cfg.get('default_scope') == 'mmpretrain':
        for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(field):  # mmpretrain's own tools fill this in, its configs do not say it
                cfg[field].setdefault('collate_fn', dict(type='default_collate'))
    return cfg


def _check_custom_imports(cfg: Config, path: str) -> None:
    def types(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            yield node.get('type')
            node = list(node.values())
        if isinstance(node, (list, tuple)):
            for child in node:
                yield from types(child)

    needs_us = [name for name in types(cfg.to_dict()) if name in OUR_TYPES]
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    if needs_us and not any(
        name.split('.')[0] == 'bnet_mm' for name in ([imports] if isinstance(imports, str) else imports)
    ):
        raise UserError(
            f"{path} uses type='{needs_us[0]}' but does not import bnet_mm: add "
            "custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False) to it"
        )


def _check_option(key: str, cfg: Config) -> None:
    """Refuse an option that would be merged and then read by nobody."""
    first = key.split('.')[0]
    known = [*inspect.signature(Runner.__init__).parameters, *OTHER_KEYS]
    if first in known:
        return
    if first == 'custom_imports':
        raise UserError(f'--cfg-options {key}: imports are done before options are read; put it in the config file')
    if first in cfg:
        raise UserError(
            f'--cfg-options {key}: {first} is only a variable inside the config file, and its value has been used '
            'already; set the places that it went to, such as train_dataloader.dataset.data_root'
        )
    close = difflib.get_close_matches(first, known, n=1)
    raise UserError(f'--cfg-options {key}: there is no {first}' + (f'; did you mean {close[0]}?' if close else ''))


def build_model(cfg: Config) -> nn.Module:
    """The model of the config as the runner builds it, without reading pretrained weights."""
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with clear_errors(f'the model {cfg.model.type} cannot be built'):
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
            return MODELS.build(cfg.model)


def load_complete(model: nn.Module, path: str) -> dict:
    """Load every tensor of ``model`` from a checkpoint file; what the file holds beyond them is printed.

    Returns:
        The other entries of the file, such as ``meta``.

    Raises:
        UserError: If the file cannot be read safely, lacks a tensor, or has one of another shape.
    """
    with clear_errors('nothing was written'):
        checkpoint = load_checkpoint_file(path, map_location='cpu')
        state_dict = checkpoint.get('state_dict', checkpoint)
        state_dict = {name.removeprefix('module.'): value for name, value in state_dict.items()}
        try:
            result = model.load_state_dict(state_dict, strict=False)
        except CheckpointError:
            raise
        except RuntimeError as error:  # torch's list of shapes that differ, below a headline
            reason = ' '.join(str(error).splitlines()[1:2]).strip()
            raise CheckpointError(f'{path} is not a checkpoint of this model: {reason}') from error
    if missing := [name for name in result.missing_keys if not name.endswith('num_batches_tracked')]:
        some = ', '.join(missing[:4]) + (' ...' if len(missing) > 4 else '')
        raise UserError(f'{path} lacks {len(missing)} tensors of this model: {some}')
    if result.unexpected_keys:
        print(f'not in the model, left out: {", ".join(result.unexpected_keys)}')
    return {name: value for name, value in checkpoint.items() if 'state_dict' in checkpoint and name != 'state_dict'}


def resume_from(cfg: Config, resume: str | None) -> None:
    """Set up ``--resume`` (the latest checkpoint in the work dir) or ``--resume CHECKPOINT``."""
    if resume is None:
        return
    if resume == 'auto':
        latest = find_latest_checkpoint(cfg.work_dir)
        if latest is None:
            raise UserError(f'--resume: nothing to resume in {cfg.work_dir} (no last_checkpoint there)')
    cfg.resume = True
    cfg.load_from = None if resume == 'auto' else resume


class AffineSyncBatchNorm(SyncBatchNorm):
    """Stands for torch's or mmcv's SyncBatchNorm on a CPU, with its parameters and the keys of its state dict."""

    @classmethod
    def from_host(cls, norm: nn.Module) -> AffineSyncBatchNorm:
        layer = super().from_host(norm)
        layer.affine, layer.weight, layer.bias = norm.affine, norm.weight, norm.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.affine or not self.training or world_size(self.process_group) == 1:
            return y  # batch norm has applied the affine
        shape = [1, -1] + [1] * (x.dim() - 2)
        return torch.addcmul(self.bias.view(shape), y, self.weight.view(shape)).to(x.dtype)


@MODEL_WRAPPERS.register_module()
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


class CheckedRunner(Runner):
    """mmengine's Runner that does not go on with a checkpoint of another model.

    With ``strict_loading`` (testing and resuming) the file must hold every tensor of the model; without it
    (``load_from`` for fine-tuning) one tensor at least has to fit. mmengine logs what else is missing or left over.
    """

    strict_loading = False

    def _init_model_weights(self) -> None:
        with clear_errors('the weights of the model cannot be initialised'):
            super()._init_model_weights()

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        missing = []
        handle = model.register_load_state_dict_post_hook(lambda _, keys: missing.extend(keys.missing_keys))
        try:
            checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        finally:
            handle.remove()
        own = {key: value.shape for key, value in model.state_dict().items()}
        state_dict = checkpoint.get('state_dict', checkpoint)
        loaded = {key: value.shape for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
        problems = [f'no {key}' for key in missing if not key.endswith('num_batches_tracked')]
        # A BNET layer takes a smaller kernel, and refuses what does not fit by itself.
        problems += [
            f'{key} is {tuple(shape)}, not {tuple(own[key])}'
            for key, shape in loaded.items()
            if key in own and own[key] != shape and not key.endswith('bnconv.weight')
        ]
        if self.strict_loading and problems:
            more = f' and {len(problems) - 4} more' if len(problems) > 4 else ''
            raise CheckpointError(f'{filename} is not a checkpoint of this model: {", ".join(problems[:4])}{more}')
        if not any(own.get(key.removeprefix('module.')) == shape for key, shape in loaded.items()):
            raise CheckpointError(f'{filename} is not a checkpoint of this model: no tensor in it fits')
        return checkpoint


def build_runner(cfg: Config, strict_loading: bool) -> Runner:
    """The runner that the config asks for; its ``runner_type``, if any, is respected."""
    start_process_group(cfg)
    with clear_errors('the model or another part of the config cannot be built'):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else CheckedRunner.from_cfg(cfg)
    runner.strict_loading = strict_loading
    return runner
