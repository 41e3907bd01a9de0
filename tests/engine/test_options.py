"""What the options of the tools do to a config."""

import copy

import pytest
import torch
from mmengine.config import Config

from bnet_mm.cli import UserError
from bnet_mm.engine.options import check_pretrained, draw_predictions, scale_lr, use_amp, use_tta


def test_pretrained_files_are_looked_for_everywhere(tmp_path):
    (tmp_path / 'there.pth').touch()
    init = dict(type='Pretrained', checkpoint=f'{tmp_path}/there.pth')
    good = dict(backbone=dict(init_cfg=[dict(type='Normal'), init]), heads=[dict(pretrained=None)])
    check_pretrained(good)
    check_pretrained(dict(pretrained='https://example.invalid/a.pth', neck=dict(checkpoint='no init_cfg')))
    for where in (
        dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='no.pth'))),
        dict(heads=[good, dict(stem=(dict(pretrained='no.pth'),))]),
    ):
        with pytest.raises(UserError, match='pretrained weights no.pth: does not exist. Put the file there'):
            check_pretrained(where)


def test_amp(monkeypatch):
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD'))))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='--amp needs a GPU'):
        use_amp(cfg)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    use_amp(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', optimizer=dict(type='SGD'), loss_scale='dynamic')


def test_learning_rate():
    cfg = Config(dict(auto_scale_lr=dict(enable=False, base_batch_size=16)))
    scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    for without in (dict(), dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(UserError, match='no auto_scale_lr.base_batch_size'):
            scale_lr(Config(without))


@pytest.mark.parametrize('scope, option, place', [
    ('mmdet', 'draw', 'test_out_dir'), ('mmseg', 'draw', None), ('mmaction', 'enable', 'out_dir'),
    ('mmpretrain', 'enable', 'out_dir'),
])  # fmt: skip
def test_pictures(scope, option, place):
    hook = dict(type='VisualizationHook')
    cfg = Config(dict(default_scope=scope, work_dir='w', default_hooks=dict(visualization=hook), visualizer=dict()))
    draw_predictions(cfg, 'vis')
    found = cfg.default_hooks.visualization
    assert found[option] is True and found.interval == 1
    assert (found[place] if place else cfg.visualizer.save_dir) == ('vis' if scope == 'mmdet' else 'w/vis')


@pytest.mark.parametrize('change', [dict(default_scope='mmpose'), dict(default_hooks=dict())])
def test_pictures_without_a_hook(change):
    cfg = dict(default_scope='mmdet', work_dir='w', default_hooks=dict(visualization=dict()))
    with pytest.raises(UserError, match='--show-dir: the config has no visualization hook'):
        draw_predictions(Config({**cfg, **change}), 'vis')


PIPELINE = [dict(type='Load'), dict(type='Pack', meta_keys=('img_id',))]


def test_augmentation_of_detectors_flips():
    """Inside of wrapped data sets, and with the flips among what is packed; the model is wrapped."""
    dataset = dict(type='Repeat', dataset=dict(type='Coco', pipeline=copy.deepcopy(PIPELINE)))
    cfg = Config(dict(default_scope='mmdet', model=dict(type='D'), test_dataloader=dict(dataset=dataset)))
    use_tta(cfg)
    load, augment = cfg.test_dataloader.dataset.dataset.pipeline
    assert load == PIPELINE[0] and augment.type == 'TestTimeAug'
    flips, packs = augment.transforms
    assert [flip.prob for flip in flips] == [1.0, 0.0]
    assert packs == [dict(type='Pack', meta_keys=('img_id', 'flip', 'flip_direction'))]
    assert cfg.model.type == 'DetTTAModel' and cfg.model.module == dict(type='D')


def test_augmentation_of_the_config():
    cfg = dict(default_scope='mmseg', model=dict(type='S'), test_dataloader=dict(dataset=dict(pipeline=PIPELINE)))
    with pytest.raises(UserError, match='no tta_model and tta_pipeline'):
        use_tta(Config(cfg))
    cfg = Config({**cfg, 'tta_model': dict(type='SegTTAModel'), 'tta_pipeline': [dict(type='Mine')]})
    use_tta(cfg)
    assert cfg.model == dict(type='SegTTAModel', module=dict(type='S'))
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='Mine')]
