"""CBNBurnIn, FreezeTransform, NormStatisticsHook and PairedRun."""

import json
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner, set_random_seed
from torch import nn

import bnet_mm.host.compat  # noqa: F401  (before mmengine asks torchvision for its version)
from bnet_mm import BNET, CBN
from bnet_mm.engine.hooks import FreezeTransform, NormStatisticsHook, PairedRun, norm_statistics


def test_burn_in_hook_counts_epochs():
    """burnin epochs are burnin * len(train_dataloader) iterations, in loops that count either."""

    class Runner:
        train_dataloader = range(5)
        model = nn.ModuleList([CBN(3, burnin=2), nn.Conv2d(1, 1, 1)])

    hook = HOOKS.build(dict(type='CBNBurnIn'))
    runner = Runner()
    hook.before_train(runner)
    active = []
    cbn = Runner.model[0]
    cbn._convolution = (Runner.model[1],)
    for iteration in range(12):
        runner.iter = iteration
        hook.before_train_iter(runner, batch_idx=iteration % 5)
        active.append(cbn._uses_history(torch.ones(2, 3, requires_grad=True)))
    assert active == [False] * 10 + [True] * 2


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = BNET(4, k=3)
        self.head = nn.Conv2d(4, 1, 3)

    def forward(self, x, mode='loss'):
        return dict(loss=self.head(self.bn(self.conv(x))).square().mean())


def run(work_dir, epochs, hook=None, **options):
    data = [dict(x=image) for image in torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    states = []

    class Record(FreezeTransform):
        def after_train_epoch(self, runner):
            model = getattr(runner.model, 'module', runner.model)
            states.append({key: value.clone() for key, value in model.state_dict().items()})

    runner = Runner(
        Toy(),
        str(work_dir),
        train_dataloader=dict(
            batch_size=2,
            dataset=data,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
            num_workers=0,
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-2)),
        custom_hooks=[hook or Record(epoch=1)],
        default_hooks=dict(logger=None, runtime_info=None),
        experiment_name=f'freeze{work_dir.name}{epochs}{len(options)}',
        **options,
    )
    runner.train()
    return states


def moved(old, new, part):
    return {not torch.equal(value, new[key]) for key, value in old.items() if key.startswith(part)}


def test_freeze_transform(tmp_path):
    states = run(tmp_path, 5)
    for epoch in range(1, 5):  # epochs 0 and 1 train the transform
        before, after = states[epoch - 1], states[epoch]
        assert moved(before, after, 'bn.bnconv') == {epoch <= 1}
        assert moved(before, after, 'bn.norm') == moved(before, after, 'head') == {True}
    resumed = run(tmp_path, 7, load_from=str(tmp_path / 'epoch_5.pth'), resume=True)
    assert len(resumed) == 2 and moved(states[-1], resumed[-1], 'bn.bnconv') == {False}
    assert moved(states[-1], resumed[-1], 'conv') == {True}


def test_freeze_transform_in_distributed_training(tmp_path, monkeypatch):
    for name in ('LOCAL_RANK', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'):  # mmengine reads the first, sets the others
        monkeypatch.setenv(name, '0' if name == 'LOCAL_RANK' else '1')
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    try:
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
        wrapped = dict(cfg=dict(model_wrapper_cfg=dict(wrapper, find_unused_parameters=True)))
        states = run(tmp_path, 3, launcher='pytorch', **wrapped)
        assert moved(states[1], states[2], 'bn.bnconv') == {False} and moved(states[0], states[1], 'bn.bnconv') == {
            True
        }
        wrapped['cfg']['model_wrapper_cfg']['find_unused_parameters'] = False
        with pytest.raises(ValueError, match='find_unused_parameters = True'):
            run(tmp_path, 3, launcher='pytorch', **wrapped)
    finally:
        dist.destroy_process_group()


def test_freeze_transform_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='epoch must be a positive integer, got 0'):
        FreezeTransform(epoch=0)
    runner = type('Runner', (), dict(model=nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match='no BNET'):
        FreezeTransform(epoch=1).before_train(runner)


def by_loops(layer):
    """In float64 and numbers."""
    weight, k = layer.bnconv.weight.double(), layer.bnconv.k
    total = sum(value**2 for value in weight.flatten().tolist())
    centre = sum(kernel[0][k // 2][k // 2] ** 2 for kernel in weight.tolist())
    bias = sum(value**2 for value in layer.bnconv.bias.tolist())
    return dict(off_centre=1 - centre / total, tap_norm=total**0.5, bias_norm=bias**0.5)


def test_norm_statistics():
    model = nn.ModuleList([BNET(4, 5), BNET(4, 3, norm='IN'), BNET(4, 3), nn.BatchNorm2d(4)])
    for layer in model[:2]:
        nn.init.normal_(layer.bnconv.weight)
        nn.init.normal_(layer.bnconv.bias)
    model[0].norm.running_mean.copy_(torch.tensor([3.0, -2, 0, 1]))
    model[0].norm.running_var.copy_(torch.tensor([3.0, 0.5, 1, 1]))
    found = norm_statistics(model)
    running = dict(mean_min=-2, mean_max=3, var_min=0.5, var_max=3)
    want = {f'bnet/0/{key}': value for key, value in {**by_loops(model[0]), **running}.items()}
    want.update({f'bnet/1/{key}': value for key, value in by_loops(model[1]).items()})
    fresh = dict(off_centre=0, tap_norm=2, bias_norm=0, mean_min=0, mean_max=0, var_min=1, var_max=1)
    want.update({f'bnet/2/{key}': value for key, value in fresh.items()})
    assert found == pytest.approx(want, rel=1e-5)


def test_norm_statistics_reach_the_visualizer(tmp_path):
    """At the interval, counted over epochs, in the file that curves are read from."""
    run(tmp_path, 3, hook=HOOKS.build(dict(type='NormStatisticsHook', interval=4)))
    (file,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line['step'] for line in lines] == [4]  # of 3 epochs of 2 iterations
    assert set(lines[0]) == {'step', *norm_statistics(Toy())} and lines[0]['bnet/bn/off_centre'] > 0


def test_norm_statistics_refuse_a_model_without():
    with pytest.raises(ValueError, match='interval must be a positive integer, got 0'):
        NormStatisticsHook(interval=0)
    with pytest.raises(ValueError, match='no BNET'):
        NormStatisticsHook().before_train(type('Runner', (), dict(model=nn.BatchNorm2d(3))))


@MODELS.register_module(force=True)
class Chain(nn.Module):
    """Two convolutions with a norm between, which may draw random weights of its own."""

    def __init__(self, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3)
        self.bn = MODELS.build(dict(norm, num_features=4))
        self.conv2 = nn.Conv2d(4, 2, 3)

    def init_weights(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize('norm', [dict(type='BNET', k=3), dict(type='BNConv', k=3)], ids=['BNET', 'BNConv'])
def test_paired_run_starts_where_the_other_does(norm):
    """Whatever a layer has drawn, what both models have is the same; BNET's centre tap is the other's gamma."""
    start = dict(type='Chain', norm=dict(type='BN2d'))
    set_random_seed(5)
    other = Chain(dict(type='BN2d'))
    other.init_weights()

    model = Chain(norm)
    model.init_weights()
    runner = type('Runner', (), dict(model=model, iter=0))
    PairedRun(5, start).before_train(runner)
    for layer in ('conv1', 'conv2'):
        assert torch.equal(getattr(model, layer).weight, getattr(other, layer).weight)
        assert torch.equal(getattr(model, layer).bias, getattr(other, layer).bias)
    if norm['type'] == 'BNET':
        assert torch.equal(model.bn.bnconv.weight[:, 0, 1, 1], other.bn.weight)
        assert model.bn.bnconv.weight.square().sum() == other.bn.weight.square().sum()

    model.conv1.weight.data.zero_()
    runner.iter, runner.val_loop = 1, Mock()  # resumed
    PairedRun(5, start).before_train(runner)
    assert not model.conv1.weight.any()
    runner.val_loop.run.assert_called_once_with()


def test_paired_run_draws_the_same_in_every_epoch():
    runner = type('Runner', (), dict(epoch=3))
    draws = []
    for seed, epoch in ((1, 3), (1, 3), (1, 4), (2, 3)):
        torch.rand(epoch)  # whatever was drawn before
        runner.epoch = epoch
        PairedRun(seed).before_train_epoch(runner)
        draws.append((torch.rand(()).item(), np.random.rand()))
    assert draws[0] == draws[1] and len(set(draws)) == 3
