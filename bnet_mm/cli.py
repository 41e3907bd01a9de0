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
        raise UserError(f'{doing}: {in_a_line(error)}') from error


def in_a_line(error: Exception) -> str:
    """What an error says: of a file its path and what is wrong with it, of others the type and their text."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f'{error.filename}: {error.strerror}'
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    says_it_all = isinstance(error, (FileNotFoundError, FileExistsError, NotADirectoryError, CheckpointError))
    return ' '.join(f'{"" if says_it_all else f"{type(error).__name__}: "}{text}'.split())


def run_tool(main: Callable[[], None]) -> None:
    """Run ``main()``; a UserError, or a file that cannot be read or written, is one sentence and exit code 2.

    The sentence goes to stderr: a UserError's once per machine, since all processes have it, a file's from each process
    that meets it. The code is that of argparse for a wrong command line.
    """
    try:
        main()
    except UserError as error:
        if os.environ.get('LOCAL_RANK', '0') == '0':
            print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if os.environ.get('BNET_MM_TRACEBACK') == '1':
            raise
        print(f'error: {in_a_line(error)}', file=sys.stderr)
        sys.exit(2)
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
    parser.add_argument('config', help='config file, or library::path')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default work_dirs/<config name>')
    parser.add_argument(
        '--cfg-options', nargs='+', action=Options, default={}, metavar='KEY=VALUE',
        help='override config values, for instance model.backbone.bnet.k=7 train_dataloader.batch_size=4',
    )  # fmt: skip
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    parser.add_argument('--launcher', choices=launchers, default='none', help='job launcher (none)')
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, a file or ``library::path``, merge ``--cfg-options``, ``--work-dir`` and ``--launcher``.

    Raises:
        UserError: For a config that cannot be read, has no model or a setting that nobody would read, or does not
            import bnet_mm although it needs it; for an option whose place the config lacks.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = path_of(args.config)
    with clear_errors(f'config {args.config} cannot be read'):
        cfg = Config.fromfile(path)
    _check_custom_imports(cfg, args.config)
    for key in args.cfg_options:
        _check_option(key, cfg)
    with clear_errors('--cfg-options cannot be merged'):
        cfg.merge_from_dict(args.cfg_options)
    _check_sections(cfg, args.config)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or f'work_dirs/{Path(path).stem}'
    if cfg.get('default_scope') == 'mmpretrain':
        for field in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(field):  # mmpretrain's own tools fill this in, its configs do not say it
                cfg[field].setdefault('collate_fn', dict(type='default_collate'))
    return cfg


def check_file(what: str, path: str) -> None:
    """Raise a UserError, which begins with ``what`` it is for, unless ``path`` is a file."""
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise UserError(f'{what} {path} ' + ('is a folder, not a file' if os.path.isdir(path) else 'does not exist'))


def path_of(config: str) -> str:
    """The file of a config, which is given as a file, ``bnet_mm::name`` or ``library::path``.

    Raises:
        UserError: If there is none; the nearest names are in the message.
    """
    library, _, name = config.rpartition('::')
    if not library:
        check_file('config', config)
        return config
    if config.startswith(PREFIX):
        with clear_errors(f'config {config}'):
            return find_config(config)
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f'config {config}: {library} is not installed')
    configs = Path(spec.submodule_search_locations[0]) / '.mim' / 'configs'
    path = configs / f'{name.removesuffix(".py")}.py'
    if not path.is_file():
        known = [f'{library}::{one.relative_to(configs).as_posix()}' for one in configs.rglob('*.py')]
        close = difflib.get_close_matches(config, known, n=3, cutoff=0)
        nearest = f'; the nearest are {", ".join(close)}' if close else ''
        raise UserError(f'{library} has no config {name}{nearest}')
    return str(path)


def base_from(config: str, out: str) -> str:
    """What ``_base_`` in the config ``out`` says to inherit from ``config``, a file or ``library::path``.

    Raises:
        UserError: As :func:`path_of`.
    """
    path = path_of(config)
    return config if '::' in config else os.path.relpath(path, os.path.dirname(os.path.abspath(out)))


def read_base(title: str, base: str, temporary: Path) -> Config:
    """The config that a new one inherits from, as ``_base_`` finds it from where the new one will stand.

    Args:
        title: What the user calls it.
        base: Its path or name, as ``_base_`` takes it.
        temporary: A file there, which is written.

    Raises:
        UserError: If it cannot be read.
    """
    temporary.write_text(f'_base_ = {base!r}\n')
    with clear_errors(f'config {title} cannot be inherited from'):
        # A new-style config cannot be inherited from in this way; config_text says so.
        new_style = '::' not in title and Config._is_lazy_import(title)
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
