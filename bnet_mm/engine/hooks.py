"""Training hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner, set_random_seed
from torch import Tensor, nn

from bnet_mm.layers import BNET, CBN
from bnet_mm.layers.arguments import check_positive_int
from bnet_mm.visualization.taps import off_centre


class CBNBurnIn(Hook):
    """Tells every CBN layer the epoch, so that ``burnin`` works: ``custom_hooks=[dict(type='CBNBurnIn')]``.

    An epoch is one pass over the training data loader, also where the loop counts iterations.
    """

    def before_train(self, runner: Runner) -> None:
        self._layers = [module for module in runner.model.modules() if isinstance(module, CBN)]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        epoch = runner.iter / len(runner.train_dataloader)
        for layer in self._layers:
            layer.set_epoch(epoch)


class FreezeTransform(Hook):
    """Stops the training of all BNET transforms: ``custom_hooks=[dict(type='FreezeTransform', epoch=60)]``.

    The official ResNet-101 recipe has it (``stop: True``). Statistics and all other weights go on. With several
    processes the config also needs ``find_unused_parameters = True``: the frozen weights get no gradient any more.

    Args:
        epoch: The last epoch, counted from 0 as in the official code, in which the transforms train.

    Raises:
        ValueError: For an epoch below 1; at the start of the training if the model has no BNET, or if it is
            distributed without ``find_unused_parameters``.
    """

    def __init__(self, epoch: int) -> None:
        check_positive_int('FreezeTransform', 'epoch', epoch)
        self.epoch = epoch

    def before_train(self, runner: Runner) -> None:
        if not _transforms(runner):
            raise ValueError('FreezeTransform: the model has no BNET')
        if is_model_wrapper(runner.model) and not getattr(runner.model, 'find_unused_parameters', True):
            raise ValueError('FreezeTransform: distributed training needs find_unused_parameters = True in the config')

    def before_train_epoch(self, runner: Runner) -> None:
        if runner.epoch <= self.epoch:
            return
        for transform in _transforms(runner):
            transform.requires_grad_(False)
            for parameter in transform.parameters():
                parameter.grad = None  # or the optimizer would go on with the last one
        if runner.epoch == self.epoch + 1:
            runner.logger.info(f'FreezeTransform: BNET transforms are frozen from epoch {runner.epoch + 1} on')


class NormStatisticsHook(Hook):
    """Logs what BNET layers learn: ``custom_hooks=[dict(type='NormStatisticsHook', interval=50)]``.

    Through mmengine's visualizer, so that all its backends (scalars.json, TensorBoard, WandB) show, for each layer,
    ``bnet/<layer>/`` with ``off_centre`` (share of tap energy off the centre, 0 in BN), ``tap_norm`` and ``bias_norm``
    (Euclidean), and, of a normaliser with running statistics, ``mean_min``, ``mean_max``, ``var_min``, ``var_max``.

    Args:
        interval: Iterations from one entry to the next.

    Raises:
        ValueError: For an interval below 1; at the start of the training if the model has no BNET.
    """

    priority = 'BELOW_NORMAL'

    def __init__(self, interval: int = 50) -> None:
        check_positive_int('NormStatisticsHook', 'interval', interval)
        self.interval = interval

    def before_train(self, runner: Runner) -> None:
        if not _transforms(runner):
            raise ValueError('NormStatisticsHook: the model has no BNET')

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            model = runner.model.module if is_model_wrapper(runner.model) else runner.model
            runner.visualizer.add_scalars(norm_statistics(model), step=runner.iter + 1)


class PairedRun(Hook):
    """Makes two trainings with one seed differ in nothing but their configs: a paired comparison.

    Without it a layer that draws random weights gives all layers after it, and the augmentation, other random numbers.
    Here every weight that the model shares with ``start`` begins as it does there, and the random numbers of an epoch
    depend on seed and epoch alone, so that a resumed run, which validates first, goes on as if it had never stopped
    (with workers of the data loader their own seeds decide, as ever in mmengine).

    Args:
        seed: That of ``randomness`` in the config.
        start: The config of the model whose initial weights count; None: the model's own.
    """

    priority = 'VERY_HIGH'

    def __init__(self, seed: int, start: dict | None = None) -> None:
        self.seed, self.start = seed, start

    def before_train(self, runner: Runner) -> None:
        if runner.iter > 0:  # resumed; the last epoch may have been saved and not validated any more
            runner.val_loop.run()
            return
        if self.start is None:
            return
        set_random_seed(self.seed)
        other = MODELS.build(copy.deepcopy(self.start))
        other.init_weights()
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        own = model.state_dict()
        shared = {name: value for name, value in other.state_dict().items() if _fits(own, name, value)}
        model.load_state_dict(shared, strict=False)

    def before_train_epoch(self, runner: Runner) -> None:
        set_random_seed(1000 * self.seed + runner.epoch, diff_rank_seed=True)


def _fits(own: dict, name: str, value: Any) -> bool:
    return name not in own or own[name].shape == value.shape  # a norm's weight is found by another name in BNET


@torch.no_grad()
def norm_statistics(model: nn.Module) -> dict[str, float]:
    """The scalars of :class:`NormStatisticsHook`, with one transfer from the device."""
    found: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BNET):
            weight, bias = layer.bnconv.weight.float(), layer.bnconv.bias.float()
            energy = weight.square().sum()
            share = off_centre(weight[:, 0]).square().sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
            values = dict(off_centre=share, tap_norm=energy.sqrt(), bias_norm=bias.norm())
            for key in ('mean', 'var'):
                if isinstance(running := getattr(layer.norm, f'running_{key}', None), Tensor):
                    values[f'{key}_min'], values[f'{key}_max'] = running.float().aminmax()
            found.update({f'bnet/{name}/{key}': value for key, value in values.items()})
    return dict(zip(found, torch.stack(list(found.values())).tolist())) if found else {}


def _transforms(runner: Runner) -> list:
    return [module.bnconv for module in runner.model.modules() if isinstance(module, BNET)]
