"""One batch through a config: whether its data, its model and its evaluation go together."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from bnet_mm.cli import clear_errors
from bnet_mm.engine.runner import build_model
from bnet_mm.layers.arguments import Duck


def dry_batch(cfg: Config) -> dict[str, float]:
    """Losses of the untrained model on one batch of the training data; one image of val is evaluated as well.

    Raises:
        UserError: If any of it fails.
    """
    MMLogger.get_instance('dry batch', log_level='CRITICAL')  # what is said of results that are empty
    scope = DefaultScope.overwrite_default_scope(cfg.default_scope)
    with clear_errors('the dry batch failed'), scope, torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
        model: Duck = revert_sync_batchnorm(build_model(cfg)).to(get_device())
        model.train()
        batch = next(iter(_loader(cfg.train_dataloader)))
        _, losses = model.parse_losses(model(**model.data_preprocessor(batch, True), mode='loss'))
        model.eval()
        loader = _loader(dict(cfg.val_dataloader, batch_size=1))
        evaluator = Evaluator(cfg.val_evaluator)
        evaluator.dataset_meta = loader.dataset.metainfo
        batch = next(iter(loader))
        evaluator.process(model.val_step(batch), batch)
        evaluator.evaluate(1)
    return {name: float(value) for name, value in losses.items() if 'loss' in name}


def _loader(cfg: Any) -> Any:
    return Runner.build_dataloader(dict(cfg, num_workers=0, persistent_workers=False), seed=0)
