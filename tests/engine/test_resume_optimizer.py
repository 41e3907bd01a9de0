"""Resuming with the optimizer of another model: one sentence, and nothing is changed."""

import copy

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from bnet_mm import BNET
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.engine.optimizer_state import check_optimizer_state
from bnet_mm.engine.runner import CheckedRunner


class Images(Dataset):
    metainfo = dict(classes=('one',))

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return dict(inputs=torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)))


class Model(BaseModel):
    def __init__(self, norm, out=4):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, out, 3), norm(out), nn.Linear(out, 1)

    def forward(self, inputs, mode='tensor'):
        y = self.fc(self.bn(self.conv(torch.stack(inputs) if isinstance(inputs, list) else inputs)).mean((2, 3)))
        return dict(loss=y.square().mean()) if mode == 'loss' else y


def runner(model, work_dir, kind=CheckedRunner, optimizer=None, **options):
    return kind(
        model, str(work_dir), train_cfg=dict(by_epoch=True, max_epochs=2), experiment_name=f'run{id(model)}',
        train_dataloader=dict(batch_size=2, dataset=Images(), sampler=dict(type=DefaultSampler, shuffle=False)),
        optim_wrapper=dict(optimizer=optimizer or dict(type='SGD', lr=0.01, momentum=0.9)), log_level='ERROR',
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)), **options,
    )  # fmt: skip


def bnet(width):
    return BNET(width, k=3)


@pytest.fixture
def bn_run(tmp_path):
    """A run of two epochs with BN, of which each epoch's checkpoint is there."""
    runner(Model(nn.BatchNorm2d), tmp_path / 'bn').train()
    return tmp_path / 'bn'


@pytest.mark.parametrize('optimizer', [dict(type='SGD', lr=0.01, momentum=0.9), dict(type='AdamW', lr=0.01)])
def test_a_bn_run_with_a_bnet_model(tmp_path, optimizer):
    runner(Model(nn.BatchNorm2d), tmp_path / 'bn', optimizer=optimizer).train()
    model = Model(bnet)
    before = copy.deepcopy(model.state_dict())
    other = runner(
        model, tmp_path / 'bnet', optimizer=optimizer, resume=True, load_from=str(tmp_path / 'bn' / 'epoch_1.pth')
    )
    key = 'momentum_buffer' if optimizer['type'] == 'SGD' else 'exp_avg'
    with pytest.raises(CheckpointError, match='cannot resume') as caught:
        other.train()
    text = str(caught.value)
    assert f'its {key} is (4,) where bn.bnconv.weight is (4, 1, 3, 3)' in text and 'load_from' in text
    assert '\n' not in text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_load_from_and_the_same_model_go_on(bn_run, tmp_path):
    runner(Model(bnet), tmp_path / 'bnet', load_from=str(bn_run / 'epoch_1.pth')).train()
    again = runner(Model(bnet), tmp_path / 'bnet2', resume=True, load_from=str(tmp_path / 'bnet' / 'epoch_1.pth'))
    again.train()
    assert again.epoch == 2 and again.optim_wrapper.optimizer.state
    by_hand = runner(Model(bnet), tmp_path / 'bnet3')
    with pytest.raises(CheckpointError, match='cannot resume'):
        by_hand.resume(str(bn_run / 'epoch_1.pth'))
    by_hand.resume(str(bn_run / 'epoch_1.pth'), resume_optimizer=False)
    assert by_hand.epoch == 1


def test_another_number_of_parameters(bn_run, tmp_path):
    model = Model(lambda width: nn.Sequential(BNET(width), nn.Conv2d(width, width, 1)))
    other = runner(model, tmp_path / 'more')
    with pytest.raises(CheckpointError, match='it has 6 parameters in 1 groups, here are 8 in 1'):
        other.resume(str(bn_run / 'epoch_1.pth'))


def test_several_optimizers_and_states_of_other_shapes():
    layers = nn.ModuleDict(dict(a=nn.Linear(3, 4), b=nn.Linear(4, 2)))

    def wrappers(kind, layers, **options):
        return OptimWrapperDict(
            **{name: OptimWrapper(kind(layer.parameters(), **options)) for name, layer in layers.items()}
        )

    def stepped(wrapper, layers):
        layers['b'](layers['a'](torch.randn(5, 3))).sum().backward()
        for part in wrapper.values():
            part.step()
        return wrapper.state_dict()

    for kind, options in ((torch.optim.Adam, {}), (torch.optim.Adafactor, {}), (torch.optim.SGD, dict(momentum=0.9))):
        wrapper = wrappers(kind, layers, **options)
        state = stepped(wrapper, layers)
        check_optimizer_state(wrapper, state, layers)
        if kind is torch.optim.Adafactor:
            continue
        other = nn.ModuleDict(dict(a=nn.Linear(3, 4), b=nn.Linear(4, 3)))
        with pytest.raises(CheckpointError, match=r'\(2, 4\) where b.weight is \(3, 4\)'):
            check_optimizer_state(wrappers(kind, other, **options), state, other)


def test_mmengines_own_runner_is_as_it_was(bn_run, tmp_path):
    """It fails in the first step: the fault that the check is for."""
    other = runner(Model(bnet), tmp_path / 'bnet', kind=Runner, resume=True, load_from=str(bn_run / 'epoch_1.pth'))
    with pytest.raises(RuntimeError, match='must match'):
        other.train()
