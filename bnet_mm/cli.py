"""What the command-line tools share: arguments, config, clear errors."""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

import bnet_mm.host.compat  # noqa: F401  (mends installed libraries, before anything else imports them)
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.host.configs import PREFIX, find_config
from bnet_mm.register import our_types
from bnet_mm.surgery.config import dicts_in

# What mmengine reads from a config beside the arguments of its Runner, and what our tools read.
OTHER_KEYS = (
    'activation_checkpointing', 'compile', 'efficient_conv_bn_eval', 'find_unused_parameters', 'gpu_ids',
    'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn', 'tta_model', 'tta_pipeline',
)  # fmt: skip
# Sections of which mmengine takes what it knows and does not look at the rest.
SECTIONS = {
    'auto_scale_lr': ('enable', 'base_batch_size'),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
}


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


class Options(DictAction):
    """``--cfg-options``: what is no KEY=VALUE is an error of the command line, not of the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *args: Any) -> None:
        try:
            super().__call__(parser, namespace, values, *args)
        except (ValueError, AssertionError) as error:
            raise argparse.ArgumentError(self, f'takes KEY=VALUE, got {" ".join(values)}') from error


def common_arguments(description: str) -> argparse.ArgumentParser:
    """The options that training and testing share, as OpenMMLab users know them."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default work_dirs/<config name>')
    parser.add_argument(
        '--cfg-options', nargs='+', action=Options, default={}, metavar='KEY=VALUE',
        help='override config values, for instance model.backbone.bnet.k=7 train_dataloader.batch_size=4',
    )  # fmt: skip
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, a file or ``bnet_mm::name``, merge ``--cfg-options``, ``--work-dir`` and ``--launcher``.

    Raises:
        UserError: For a config that cannot be read, has no model or a setting that nobody would read, or does not
            import bnet_mm although it needs it; for an option whose place the config lacks.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    with clear_errors(f'config {args.config} cannot be read'):
        cfg = Config.fromfile(find_config(args.config) if args.config.startswith(PREFIX) else args.config)
    _check_custom_imports(cfg, args.config)
    for key in args.cfg_options:
        _check_option(key, cfg)
    with clear_errors('--cfg-options cannot be merged'):
        cfg.merge_from_dict(args.cfg_options)
    _check_sections(cfg, args.config)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(args.config.removeprefix(PREFIX)).stem}'
    if cfg.get('default_scope') == 'mmpretrain':
        for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(field):  # mmpretrain's own tools fill this in, its configs do not say it
                cfg[field].setdefault('collate_fn', dict(type='default_collate'))
    return cfg


def base_from(config: str, out: str) -> str:
    """What ``_base_`` in the config ``out`` says to inherit from ``config``, a file or ``library::path``.

    Raises:
        UserError: If the file does not exist.
    """
    if '::' in config:
        return config
    if not os.path.isfile(config):
        raise UserError(f'config {config} does not exist')
    return os.path.relpath(config, os.path.dirname(os.path.abspath(out)))


def read_base(title: str, base: str, temporary: Path) -> Config:
    """The config that a new one inherits from, as ``_base_`` finds it from where the new one will stand.

    Args:
        title: What the user calls it.
        base: Its path or name, as ``_base_`` takes it.
        temporary: A file there, which is written.

    Raises:
        UserError: If it cannot be read.
    """
    library, _, name = title.partition('::')
    if name:
        spec = find_spec(library)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f'config {title}: {library} is not installed')
        configs = Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'
        known = [path.relative_to(configs).as_posix() for path in configs.rglob('*.py')]
        if known and f'{name.removesuffix(".py")}.py' not in known:
            close = [f'{library}::{one}' for one in difflib.get_close_matches(name, known, n=3, cutoff=0)]
            raise UserError(f'{library} has no config {name}; the nearest are {", ".join(close)}')
    temporary.write_text(f'_base_ = {base!r}\n')
    with clear_errors(f'config {title} cannot be inherited from'):
        # A new-style config cannot be inherited from in this way; config_text says so.
        new_style = not name and Config._is_lazy_import(title)
        return Config.fromfile(title if new_style else temporary)


def _check_custom_imports(cfg: Config, path: str) -> None:
    types = [node.get('type') for _, node in dicts_in(cfg.to_dict())]
    needs_us = [name for name in types if name in our_types()]
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    if needs_us and not any(
        name.split('.')[0] == 'bnet_mm' for name in ([imports] if isinstance(imports, str) else imports)
    ):
        raise UserError(
            f"{path} uses type='{needs_us[0]}' but does not import bnet_mm: add "
            "custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False) to it"
        )


def _check_sections(cfg: Config, path: str) -> None:
    """Refuse what mmengine would not look at."""
    if not cfg.get('model'):
        raise UserError(f'config {path} has no model')
    for section, known in SECTIONS.items():
        given = cfg.get(section)
        if unknown := sorted(set(given) - set(known)) if isinstance(given, dict) else []:
            raise UserError(f'{section} takes {", ".join(known)}, got {", ".join(unknown)}')
    if not isinstance(cfg.get('resume', False), bool):
        raise UserError(f'resume is True or False, got {cfg.resume!r}; name a checkpoint with --resume CHECKPOINT')


def _check_option(key: str, cfg: Config) -> None:
    """Refuse an option that would be merged and then read by nobody."""
    first = key.split('.')[0]
    if first == 'launcher':
        raise UserError(f'--cfg-options {key}: it has an option of its own, --launcher')
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
