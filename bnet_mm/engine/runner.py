"""Models and runners from configs, with checkpoints that must fit."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import LoggerHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, RUNNERS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from bnet_mm.checkpoint.latest import NOTE, latest_checkpoint
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from bnet_mm.cli import UserError, check_file, clear_errors
from bnet_mm.engine.optimizer_state import check_optimizer_state
from bnet_mm.engine.processes import start_process_group
from bnet_mm.files import make_folder
from bnet_mm.messages import first_of
from bnet_mm.surgery.config import type_name

# What torch says of a shape that does not fit.
SIZES = re.compile(r'size mismatch for (\S+): .*?\[(.*?)\]\).*?\[(.*?)\]\)\.?')


def build_model(cfg: Config) -> nn.Module:
    """The model of the config as the runner builds it, without reading pretrained weights."""
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with clear_errors(f'the model {type_name(cfg.model)} cannot be built'):
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
        raise UserError(f'{path} lacks {len(missing)} tensors of this model: {first_of(missing)}')
    if result.unexpected_keys:
        print(f'not in the model, left out: {", ".join(result.unexpected_keys)}')
    return {name: value for name, value in checkpoint.items() if 'state_dict' in checkpoint and name != 'state_dict'}


def resume_from(cfg: Config, resume: str | None) -> None:
    """Set up ``--resume`` (the latest checkpoint in the work dir) or ``--resume CHECKPOINT``."""
    if resume is None:
        return
    if resume == 'auto':
        note, latest = Path(cfg.work_dir, NOTE), latest_checkpoint(cfg.work_dir)
        if not note.is_file():
            raise UserError(f'--resume: nothing to resume in {cfg.work_dir} (no {NOTE} there)')
        if latest is None:
            raise UserError(
                f'--resume: {note} names {note.read_text()!r}, which is no file, and no complete checkpoint lies '
                'beside it; name one with --resume CHECKPOINT'
            )
        if latest != Path(note.read_text().strip()):
            print(f'--resume: {note} names {note.read_text()!r}, which is no file; going on from {latest}')
        resume = str(latest)
    elif '://' not in resume:
        check_file('checkpoint', resume)
    cfg.resume = True
    cfg.load_from = resume


class CheckedRunner(Runner):
    """mmengine's Runner that does not go on with a checkpoint of another model.

    With ``strict_loading`` (testing and resuming) the file must hold every tensor of the model; without it
    (``load_from`` for fine-tuning) one tensor at least has to fit. mmengine logs what else is missing or left over. A
    run is not resumed with the optimizer of another one, see optimizer_state.py.
    """

    strict_loading = False
    _check_optimizer = False

    def _init_model_weights(self) -> None:
        with clear_errors('the weights of the model cannot be initialised'):
            super()._init_model_weights()

    def resume(self, filename: str, resume_optimizer: bool = True, *args, **kwargs) -> None:
        self._check_optimizer = resume_optimizer
        try:
            super().resume(filename, resume_optimizer, *args, **kwargs)
        finally:
            self._check_optimizer = False

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        super().call_hook(fn_name, **kwargs)
        if fn_name == 'before_run' and get_rank():
            for hook in self.hooks:
                if isinstance(hook, LoggerHook):  # all processes would write a test's metrics into one file, at once
                    hook.json_log_path = f'{self.timestamp}_{get_rank()}.json'
        # mmengine calls this one between the reading of a file and the loading of the model from it
        if fn_name == 'after_load_checkpoint' and self._check_optimizer and 'optimizer' in kwargs['checkpoint']:
            self.optim_wrapper: Any = self.build_optim_wrapper(self.optim_wrapper)
            check_optimizer_state(self.optim_wrapper, kwargs['checkpoint']['optimizer'], self.model)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """mmengine's, with a warning for parameters that train and that its constructor has put into no group."""
        built = super().build_optim_wrapper(optim_wrapper)
        groups = built.param_groups.values() if isinstance(built.param_groups, dict) else [built.param_groups]
        grouped = {id(value) for group in groups for part in group for value in part['params']}
        trained = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        left_out = [name for name, value in trained if id(value) not in grouped]
        if left_out and built is not optim_wrapper:  # built before, it was said before
            self.logger.warning(f'the optimizer has no group for {first_of(left_out)}: they will not train')
        return built

    def load_checkpoint(self, filename: str, *args, **kwargs) -> dict:
        model = self.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        lists, missing, errors = [], [], []

        def before(*arguments) -> None:
            lists.append(arguments[-1])  # where torch puts what it cannot load

        def after(_, keys) -> None:
            missing.extend(keys.missing_keys)
            errors.extend(lists[0])

        handles = model._register_load_state_dict_pre_hook(before), model.register_load_state_dict_post_hook(after)
        try:
            checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        own = {key: value.shape for key, value in model.state_dict().items()}
        state_dict = checkpoint.get('state_dict', checkpoint)
        loaded = {key: value.shape for key, value in state_dict.items() if isinstance(value, torch.Tensor)}
        problems = [f'no {key}' for key in missing if not key.endswith('num_batches_tracked')]
        problems += [SIZES.sub(r'\1 is (\2), not (\3)', ' '.join(error.split())) for error in errors]
        if self.strict_loading and problems:
            raise CheckpointError(f'{filename} is not a checkpoint of this model: {first_of(problems)}')
        if not any(own.get(key.removeprefix('module.')) == shape for key, shape in loaded.items()):
            raise CheckpointError(f'{filename} is not a checkpoint of this model: no tensor in it fits')
        return checkpoint


def build_runner(cfg: Config, strict_loading: bool) -> Runner:
    """The runner that the config asks for; its ``runner_type``, if any, is respected."""
    start_process_group(cfg)
    make_folder(cfg.work_dir)
    with clear_errors('the model or another part of the config cannot be built'):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else CheckedRunner.from_cfg(cfg)
    runner.strict_loading = strict_loading
    return runner


@contextmanager
def stops_clearly(runner: Runner, doing: str) -> Iterator[None]:
    """Any error inside becomes a UserError; where it came from goes to a file, for it may come after days."""
    try:
        yield
    except UserError:
        raise
    except (CheckpointError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
    except Exception as error:
        if os.environ.get('BNET_MM_TRACEBACK') == '1':
            raise
        path = Path(runner.work_dir) / runner.timestamp / 'traceback.txt'
        path.write_text(traceback.format_exc())
        text = ' '.join(str(error).split()).rstrip('.')
        raise UserError(f'{doing} stopped: {type(error).__name__}: {text}. Where: {path}') from error


def build_data(runner: Runner) -> None:
    """Build the data sets now: a missing folder or a wrong annotation file must not wait for the first epoch."""
    with clear_errors('the training data cannot be read'):
        try:
            images = len(runner.train_loop.dataloader.dataset)
        except ValueError as error:
            if 'need at least one array' not in str(error):  # numpy's words for mmengine's empty data set
                raise
            images = 0
        if images == 0:
            raise UserError(
                'the training data cannot be read: no image is left. Do the names in metainfo.classes occur in '
                'ann_file, and has any image an annotation?'
            )
    if runner._val_loop is not None:
        with clear_errors('the validation data cannot be read'):
            runner.val_loop  # noqa: B018
