"""The catalogue describes what the configs read."""

import importlib
import json
import shlex
from pathlib import Path

import pytest
from mmengine.config import Config

from bnet_mm.datasets.catalogue import DATA_SETS
from helpers.paths import REPO


@pytest.mark.parametrize('name', DATA_SETS)
def test_description(tmp_path, prepare_data, name):
    """Paths with spaces are quoted, a link leads to where the configs look, and the hosts' scripts exist."""
    root = tmp_path / 'my data'
    code, out, _ = prepare_data(name, root)
    assert code == 0 and '{root}' not in out
    assert f"ln -sn '{root}' {DATA_SETS[name].root}\n" in out and 'ln -sn' not in prepare_data(name)[1]
    assert str(root) not in out.replace(f"'{root}'", '')
    for word in shlex.split(out.split('\n\n')[-1]):
        if '.mim/' in word and not word.startswith('<'):
            assert Path(word).exists(), word


@pytest.mark.parametrize(
    'name, config, library',
    [
        ('coco', 'mask_rcnn_r50_bnet5_1x', 'mmdet'),
        ('cityscapes', 'pspnet_r50_bnet3_40k_cityscapes', 'mmseg'),
        ('voc', 'deeplabv3_r101_bnet3_voc12aug', 'mmseg'),
        ('ucf101', 'tsn_r50_bnet3_ucf101', 'mmaction'),
        ('imagenet', 'resnet50_bnet3_imagenet', 'mmpretrain'),
        ('imagenette', 'resnet50_bnet3_imagenette', 'mmpretrain'),
    ],
)
def test_configs_read_what_is_checked(toy, name, config, library):
    """The host's own data sets, built from the config, find the files that the check found."""
    pytest.importorskip(library)
    cfg = Config.fromfile(f'{REPO}/configs/{config}.py')
    registry = importlib.import_module(f'{library}.registry').DATASETS
    here, there = DATA_SETS[name].root, str(toy / name)
    for loader, parts in (('train_dataloader', ['train', 'aug']), ('val_dataloader', ['val'])):
        text = json.dumps(cfg[loader].dataset.to_dict())
        assert here in text
        dataset = json.loads(text.replace(here, there))
        for one in dataset.get('datasets', [dataset]):
            one.update(pipeline=[], _scope_=library)
            if name in ('coco', 'imagenet'):  # the others take any classes
                one.update(metainfo=dict(classes=('circle', 'square', 'triangle')))
            one.pop('filter_cfg', None)  # mmdet's, which drops images without objects
        found = len(registry.build(dataset))
        samples = [DATA_SETS[name].parts[part][1](toy / name) for part in parts if part in DATA_SETS[name].parts]
        assert found == sum(map(len, samples)) > 0
