"""The runner that does not go on with a checkpoint of another model."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import LoggerHook
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import bnet_mm
from bnet_mm import BNET, SN2d
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.cli import UserError
from bnet_mm.engine.runner import CheckedRunner, build_data, build_model, load_complete, resume_from
from helpers import reference
from helpers.checkpoints import save
from helpers.hosts import import_host_models


def strict_runner(model):
    runner = object.__new__(CheckedRunner)
    runner.model, runner.logger, runner._hooks, runner.strict_loading = model, logging.getLogger('nowhere'), [], True
    return runner


def test_the_official_layout_of_sn_can_be_resumed(tmp_path):
    """(1, C, 1, 1), which SN reads although the shape is another."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), SN2d(4))
    given = reference.randomise(net).state_dict()
    official = {
        key.replace('.bn.', '.'): value.view(1, -1, 1, 1) if value.shape == (4,) and key[0] == '1' else value
        for key, value in given.items()
    }
    fresh = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), SN2d(4))
    strict_runner(fresh).load_checkpoint(save(dict(state_dict=official), tmp_path / 'a.pth'))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, given[name]), name


@pytest.mark.parametrize('value, message', [
    ([1.0, 2.0], 'While copying the parameter named "0.weight".*expected torch.Tensor'),
    (torch.zeros(4, 3), r'0.weight is \(4, 3\), not \(4, 3, 1, 1\)'),
    (torch.zeros(4, 3, 1, 1).to_sparse(), '"0.weight"'),
])  # fmt: skip
def test_what_torch_cannot_load_is_no_checkpoint_to_resume(tmp_path, value, message):
    """mmengine logs it and goes on; of what is no tensor our runner did not know."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1))
    path = save(dict(state_dict={**net.state_dict(), '0.weight': value}), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f'a.pth is not a checkpoint of this model: {message}|not.*{message}'):
        strict_runner(net).load_checkpoint(path)


def test_pretrained_file_that_mmaction_cannot_use_is_one_sentence(tmp_path):
    """It reads torchvision's layout by itself; our runner says what was being done."""
    import_host_models('mmaction')
    path = save({'backbone.conv1.weight': torch.zeros(64, 3, 7, 7)}, tmp_path / 'a.pth')
    runner = object.__new__(CheckedRunner)
    with DefaultScope.overwrite_default_scope('mmaction'):
        runner.model = MODELS.build(dict(type='ResNet', depth=18, pretrained=path, norm_eval=False))
    with pytest.raises(UserError, match='the weights of the model cannot be initialised: KeyError: conv1.weight'):
        runner._init_model_weights()


def small_net(k=3):
    return nn.Sequential(nn.Conv2d(3, 4, 1), BNET(4, k=k))


def test_a_complete_checkpoint(tmp_path, capsys):
    """DDP's prefix and a smaller kernel are understood; what is left over is printed, other entries are given."""
    source, model = small_net(), small_net(k=5)
    nn.init.normal_(source[1].bnconv.weight)
    state_dict = {f'module.{name}': value for name, value in source.state_dict().items()}
    path = save(dict(state_dict={**state_dict, 'over': torch.ones(1)}, meta=dict(epoch=2)), tmp_path / 'a.pth')
    assert load_complete(model, path) == dict(meta=dict(epoch=2))
    assert torch.equal(model[1].bnconv.weight[..., 1:-1, 1:-1], source[1].bnconv.weight)
    assert capsys.readouterr().out == 'not in the model, left out: over\n'
    assert load_complete(model, save(source.state_dict(), tmp_path / 'b.pth')) == {}


def test_an_incomplete_checkpoint(tmp_path):
    state_dict = small_net().state_dict()
    counter = state_dict.pop('1.norm.num_batches_tracked')
    load_complete(small_net(), save(state_dict, tmp_path / 'a.pth'))  # a counter may be missing
    for name, value, message in [
        ('0.bias', None, 'a.pth lacks 1 tensors of this model: 0.bias'),
        ('0.bias', torch.ones(7), 'a.pth is not a checkpoint of this model: size mismatch for 0.bias'),
        ('1.bnconv.bias', None, 'the checkpoint has 0.weight but not the BNET layer after it, 1'),
    ]:
        changed = {key: v for key, v in {**state_dict, name: value, 'counter': counter}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            load_complete(small_net(), save(changed, tmp_path / 'a.pth'))
    with pytest.raises(UserError, match='no.pth does not exist'):
        load_complete(small_net(), 'no.pth')


def test_resuming(tmp_path, capsys):
    cfg = Config(dict(work_dir=str(tmp_path)))
    resume_from(cfg, None)
    assert 'resume' not in cfg
    with pytest.raises(UserError, match=f'nothing to resume in {tmp_path}'):
        resume_from(cfg, 'auto')
    first, second, note = (str(tmp_path / name) for name in ('epoch_1.pth', 'epoch_2.pth', 'last_checkpoint'))
    for content in ('', first):
        Path(note).write_text(content)
        with pytest.raises(UserError, match=f'names {content!r}, which is no file, and no complete checkpoint lies'):
            resume_from(cfg, 'auto')
    torch.save({}, second)
    resume_from(cfg, 'auto')
    assert cfg.resume is True and cfg.load_from == second
    assert capsys.readouterr().out == f'--resume: {note} names {first!r}, which is no file; going on from {second}\n'
    torch.save({}, first)
    for content in (first, f'{tmp_path}/./epoch_1.pth\n'):  # as mmengine writes it for --work-dir ./w
        Path(note).write_text(content)
        resume_from(cfg, 'auto')
        assert cfg.load_from == first and capsys.readouterr().out == ''
    with pytest.raises(UserError, match='checkpoint mine.pth does not exist'):
        resume_from(cfg, 'mine.pth')
    mine = tmp_path / 'mine.pth'
    mine.touch()
    resume_from(cfg, str(mine))
    assert cfg.resume is True and cfg.load_from == str(mine)


@pytest.fixture
def runner():
    """A runner that has a model and nothing else."""
    found = object.__new__(CheckedRunner)
    found.model, found._has_loaded, found._hooks, found._load_from = small_net(), False, [], None
    found.logger = SimpleNamespace(info=lambda text: None)
    return found


def test_loading_by_the_runner(runner, tmp_path):
    """All tensors, or one at least, must fit."""
    whole = small_net().state_dict()
    path = save(whole, tmp_path / 'whole.pth')
    without = {name: value for name, value in whole.items() if name != '0.bias'}
    part = save({**without, '0.weight': torch.ones(4, 2, 1, 1)}, tmp_path / 'part.pth')
    less = save(without, tmp_path / 'less.pth')
    other = save({f'other.{name}': value for name, value in whole.items()}, tmp_path / 'other.pth')
    for strict in (True, False):
        runner.strict_loading = strict
        runner.load_checkpoint(path)
        assert torch.equal(runner.model[0].weight, whole['0.weight'])
    runner.load_checkpoint(less)
    with pytest.raises(CheckpointError, match='other.pth is not a checkpoint of this model: no tensor in it fits'):
        runner.load_checkpoint(other)
    runner.strict_loading = True
    with pytest.raises(CheckpointError, match='less.pth is not a checkpoint of this model: no 0.bias$'):
        runner.load_checkpoint(less)
    with pytest.raises(CheckpointError, match='no 0.bias, 0.weight is .4, 2, 1, 1., not .4, 3, 1, 1.$'):
        runner.load_checkpoint(part)


@pytest.mark.parametrize('rank, name', [(0, '20261128_120000.json'), (1, '20261128_120000_1.json')])
def test_processes_do_not_write_into_one_file(runner, monkeypatch, rank, name):
    """Of a test's metrics, which mmengine writes in all of them: two texts of unlike length leave no JSON."""

    class Logger(LoggerHook):
        def before_run(self, runner):
            self.json_log_path = f'{runner.timestamp}.json'

    runner._timestamp, runner._hooks = '20261128_120000', [Logger()]
    monkeypatch.setattr('bnet_mm.engine.runner.get_rank', lambda: rank)
    runner.call_hook('before_run')
    assert runner.hooks[0].json_log_path == name


def test_model_that_cannot_be_built():
    with pytest.raises(UserError, match='the model BNET cannot be built: .*kernel'):
        build_model(Config(dict(model=dict(type='BNET', num_features=3, kernel=5))))
    cfg = Config(dict(model=dict(type='BNET', num_features=3)))
    assert isinstance(build_model(cfg), BNET)


def test_data_without_an_image():
    def runner(dataset):
        loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
        return SimpleNamespace(train_loop=loop, _val_loop=None)

    class Broken:
        def __init__(self, error):
            self.error = error

        def __len__(self):
            raise self.error

    build_data(runner([1]))
    for dataset in ([], Broken(ValueError('need at least one array to concatenate'))):
        with pytest.raises(UserError, match='no image is left'):
            build_data(runner(dataset))
    with pytest.raises(UserError, match='the training data cannot be read: ValueError: another'):
        build_data(runner(Broken(ValueError('another'))))


def test_parameters_that_no_group_of_the_optimizer_has(monkeypatch):
    """TSM's constructor passes over what a module has beside its children, as SN does."""
    import_host_models('mmaction')
    warned = []
    runner = object.__new__(CheckedRunner)
    monkeypatch.setattr(CheckedRunner, 'logger', SimpleNamespace(warning=warned.append), raising=False)
    for norm, names in [('SN', '1.mean_weight, 1.var_weight, 1.weight, 1.bias'), ('BN', None)]:
        layer = bnet_mm.SN2d(4) if norm == 'SN' else nn.BatchNorm2d(4)
        runner.model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(4, 4, 1), BNET(4), nn.Linear(4, 2))
        with DefaultScope.overwrite_default_scope('mmaction'):
            runner.build_optim_wrapper(
                dict(optimizer=dict(type='SGD', lr=1.0), constructor='TSMOptimWrapperConstructor')
                | dict(paramwise_cfg=dict(fc_lr5=True))
            )
        assert warned == ([f'the optimizer has no group for {names}: they will not train'] if names else [])
        warned.clear()
