"""What mmengine's runners do beside plain training, with BNET in the model: averaged weights, exact statistics, early
stopping, profiling, compilation, strategies. Trained on helpers/toy_host.py."""

import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from bnet_mm import BNET
from bnet_mm.engine.runner import build_runner
from helpers import toy_host
from helpers.hosts import import_host_models

pytest.importorskip('mmdet')
EPOCHS = "train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs={}, val_interval=1)\n"
LARGER = 'dataset = dict(size=64, length=4)\n' + ''.join(
    f'{part}_dataloader = dict(dataset=dict(size=64, length=4))\n' for part in ('train', 'val')
)
STEPS = 'train_cfg = dict(max_iters=3)\n'
IN_ORDER = 'train_dataloader.update(sampler=dict(shuffle=False))\n'
LAYER = 'backbone.layer2.0.bn2'


@pytest.fixture
def config(tmp_path):
    """config(text): the toy host's config with this in a child of it."""
    (tmp_path / 'base.py').write_text(toy_host.CONFIG)

    def read(text, name='child'):
        (tmp_path / f'{name}.py').write_text(f"_base_ = 'base.py'\n{LARGER}{text}")
        cfg = Config.fromfile(tmp_path / f'{name}.py')
        cfg.update(work_dir=str(tmp_path / name), launcher='none')
        return cfg

    return read


class Record(Hook):
    """A layer's taps after each step, before other hooks."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.taps = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.taps.append(runner.model.get_submodule(LAYER).bnconv.weight.detach().clone())


def train(cfg):
    runner, record = build_runner(cfg, strict_loading=False), Record()
    runner.register_hook(record)
    runner.train()
    return runner, record.taps


def test_averaged_weights(config):
    """The checkpoint has the mean of the taps over the steps, and the last ones beside it to go on from."""
    hook = "custom_hooks = [dict(type='EMAHook', ema_type='StochasticWeightAverage')]\n"
    cfg = config(hook + STEPS)
    _, taps = train(cfg)
    saved = torch.load(f'{cfg.work_dir}/iter_3.pth', weights_only=False)
    torch.testing.assert_close(saved['state_dict'][f'{LAYER}.bnconv.weight'], torch.stack(taps).mean(0))
    torch.testing.assert_close(saved['ema_state_dict'][f'module.{LAYER}.bnconv.weight'], taps[-1])
    assert not torch.equal(taps[-1], taps[0])
    cfg.update(resume=True)
    cfg.train_cfg.max_iters = 4
    runner = build_runner(cfg, strict_loading=True)
    runner.train()
    assert runner.iter == 4


def test_exact_statistics(config):
    """After mmpretrain's hook, the running statistics are the mean of those of the batches, by the final weights."""
    import_host_models('mmpretrain')
    hook = "custom_hooks = [dict(type='mmpretrain.PreciseBNHook', num_samples=4)]\n"
    runner, _ = train(config(hook + EPOCHS.format(1) + IN_ORDER))
    model, inputs = runner.model.train(), []
    norm = model.get_submodule(LAYER).norm
    exact = norm.running_mean.clone(), norm.running_var.clone()
    model.get_submodule(LAYER).register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    with torch.no_grad():
        for batch in runner.train_dataloader:
            model(**model.data_preprocessor(batch))
    assert len(inputs) == 2
    want = (torch.stack([fn(x) for x in inputs]).mean(0) for fn in (lambda x: x.mean((0, 2, 3)), variance))
    for got, expected in zip(exact, want):
        torch.testing.assert_close(got, expected)
    assert norm.momentum == 0.1


def variance(x):
    return x.transpose(0, 1).flatten(1).var(1)


def test_early_stopping(config):
    hook = "custom_hooks = [dict(type='EarlyStoppingHook', monitor='toy/accuracy', patience=2, min_delta=2)]\n"
    runner, _ = train(config(hook + EPOCHS.format(9)))
    assert runner.epoch == 3


def test_profiler_sees_our_operators(config, tmp_path):
    trace = tmp_path / 'trace.json'
    hook = f"custom_hooks = [dict(type='ProfilerHook', by_epoch=False, json_trace_path='{trace}')]\n"
    runner, _ = train(config(hook))
    names = {event['name'] for event in json.loads(trace.read_text())['traceEvents'] if 'name' in event}
    (backend,) = {layer.extra_repr() for layer in runner.model.modules() if isinstance(layer, BNET)}
    operator = 'bnet_mm::norm' if backend == 'backend=cpp' else 'aten::batch_norm'
    assert operator in names


@pytest.mark.parametrize('text', [
    pytest.param("runner_type = 'FlexibleRunner'\n", id='FlexibleRunner'),
    pytest.param('compile = True\n', id='compile', marks=pytest.mark.hardening),
    pytest.param("runner_type = 'FlexibleRunner'\ncompile = True\n", id='both', marks=pytest.mark.hardening),
])  # fmt: skip
def test_trains_like_plain(config, text):
    """The same data and start give the same taps."""
    start = config(STEPS, 'start')
    train(start)
    same = f"{STEPS}{IN_ORDER}load_from = '{start.work_dir}/iter_3.pth'\n"
    (_, want), (_, got) = train(config(same, 'plain')), train(config(same + text))
    assert len(got) == len(want) == 3 and not torch.equal(want[0], want[2])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
