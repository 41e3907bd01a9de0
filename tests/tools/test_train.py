"""tools/train.py as a user runs it, on a small generated data set."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from helpers.paths import REPO
from helpers.tools import DEMO, SMALL, assert_one_clear_sentence, config_with, other_architecture, run, scalars, train


def test_train_writes_checkpoint_curve_and_evaluates(trained):
    assert (trained / 'epoch_1.pth').is_file()
    lines = scalars(trained)
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
    assert 'coco/bbox_mAP_50' in lines[-1]
    layers = torch.load(trained / 'epoch_1.pth', weights_only=False)['state_dict']
    assert layers['backbone.layer1.0.bn2.bnconv.weight'].shape == (8, 1, 5, 5)


def test_killed_training_resumes(shapes, tmp_path):
    """SIGKILL after the first epoch; --resume goes on with the next iteration and ends like any other run."""
    command = [sys.executable, 'tools/train.py', DEMO, '--work-dir', tmp_path / 'w', '--cfg-options', *SMALL]
    command += ['train_cfg.max_epochs=3']
    env = {**os.environ, 'DATA_ROOT': str(shapes)}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(list(map(str, command)), cwd=REPO, env=env, **quiet)
    deadline = time.time() + 300
    while not (tmp_path / 'w' / 'last_checkpoint').exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / 'w' / 'epoch_3.pth').exists()

    done = train(shapes, tmp_path / 'w', '--resume', cfg=['train_cfg.max_epochs=3'])
    assert done.returncode == 0, done.stderr[-3000:]
    second_run = sorted((tmp_path / 'w').glob('*/vis_data/scalars.json'))[-1]
    steps = [line['step'] for line in map(json.loads, second_run.read_text().splitlines()) if 'loss' in line]
    assert steps[0] in (5, 9) and steps == list(range(steps[0], 13))
    assert (tmp_path / 'w' / 'epoch_3.pth').exists()


def test_mim_train(shapes, tmp_path):
    """The configs work without our tools: mim runs the library's own train.py."""
    pytest.importorskip('mim')
    command = [sys.executable, '-m', 'mim', 'train', 'mmdet', DEMO, '--gpus', '0', '--work-dir', tmp_path / 'w']
    done = run(*command, '--cfg-options', *SMALL, DATA_ROOT=str(shapes))
    assert (tmp_path / 'w' / 'epoch_1.pth').exists(), done.stderr[-3000:] + done.stdout[-2000:]


def broken_annotations(shapes, tmp_path, change):
    root = tmp_path / 'coco'
    shutil.copytree(shapes, root)
    path = root / 'annotations' / 'instances_train2017.json'
    path.write_text(change(path.read_text()))
    return root


BAD_TRAINING = {
    'unknown norm keyword': (
        dict(cfg=['model.neck.norm_cfg.type=BNET', 'model.neck.norm_cfg.kernel=3']), 'unknown option kernel',
    ),
    'even k': (dict(cfg=['model.backbone.bnet.k=4']), 'k must be a positive odd integer, got 4'),
    'k=0': (dict(cfg=['model.backbone.bnet.k=0']), 'k must be a positive odd integer, got 0'),
    'unknown position': (dict(cfg=['model.backbone.bnet.where=D']), "no norm to replace at where='D'"),
    'unknown bnet key': (dict(cfg=['model.backbone.bnet.kk=3']), 'bnet takes k, where, dilation and fuse, got kk'),
    'unknown option': (dict(cfg=['train_dataloder.batch_size=4']), 'did you mean train_dataloader?'),
    'option without effect': (dict(cfg=['data_root=elsewhere/']), 'data_root is only a variable inside the config'),
    'late import': (dict(cfg=['custom_imports.imports=[os]']), 'put it in the config file'),
    'unknown loop option': (dict(cfg=['train_cfg.max_epoch=4']), 'max_epoch'),
    'no such config': (dict(config='configs/nothing.py'), 'configs/nothing.py does not exist'),
    'nothing to resume': (dict(options=['--resume']), 'nothing to resume'),
    'amp without a GPU': (dict(options=['--amp']), '--amp needs a GPU'),
    'no pretrained weights': (
        dict(config='configs/faster_rcnn_r50_bnet5_1x.py', small=False),
        'pretrained weights checkpoints/R50_BNET-5.pth: does not exist',
    ),
    'resume from nowhere': (dict(options=['--resume', 'no/such.pth']), 'no/such.pth does not exist'),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD_TRAINING)
def test_bad_training_command(shapes, tmp_path, case):
    arguments, message = BAD_TRAINING[case]
    if case == 'amp without a GPU' and torch.cuda.is_available():
        pytest.skip('there is a GPU')
    config = arguments.get('config', DEMO)
    options = SMALL if arguments.get('small', True) else []
    cfg = [*options, *arguments.get('cfg', [])]
    done = run(
        'tools/train.py', config, '--work-dir', tmp_path / 'w', *arguments.get('options', []),
        *(['--cfg-options', *cfg] if cfg else []), DATA_ROOT=str(shapes),
    )  # fmt: skip
    assert_one_clear_sentence(done, message)
    assert not list((tmp_path).rglob('*.pth'))


def test_config_without_custom_imports(shapes, tmp_path):
    config = tmp_path / 'plain.py'
    config.write_text(
        "_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n"
        "model = dict(backbone=dict(norm_cfg=dict(type='BNET', k=5), init_cfg=None))\n"
    )
    done = run('tools/train.py', config, '--work-dir', tmp_path / 'w')
    assert_one_clear_sentence(done, "add custom_imports = dict(imports=['bnet_mm']")


@pytest.mark.parametrize('change, message', [
    (lambda text: text[: len(text) // 2], 'is not a COCO annotation file'),
    (lambda text: '[]', 'is not a COCO annotation file'),
    (lambda text: text.replace('"annotations": [', '"annotations": [], "x": ['), 'no image is left'),
])  # fmt: skip
def test_wrong_annotation_file(shapes, tmp_path, change, message):
    root = broken_annotations(shapes, tmp_path, change)
    done = train(root, tmp_path / 'w')
    assert_one_clear_sentence(done, message)


def test_missing_data_root(tmp_path):
    assert_one_clear_sentence(train(tmp_path / 'nowhere', tmp_path / 'w'), 'No such file or directory')


def test_missing_data_root_of_a_paper_config(tmp_path):
    cfg = ['model.backbone.init_cfg=None', f'train_dataloader.dataset.data_root={tmp_path}/nowhere/']
    done = run(
        'tools/train.py', 'configs/faster_rcnn_r50_bnet5_1x.py', '--work-dir', tmp_path / 'w', '--cfg-options', *cfg
    )
    assert_one_clear_sentence(done, 'the training data cannot be read')


def test_pretrained_weights_of_another_network_are_refused(shapes, trained, tmp_path):
    path = other_architecture(trained, tmp_path)
    text = f"model = dict(backbone=dict(init_cfg=dict(_delete_=True, type='Pretrained', checkpoint='{path}')))"
    done = train(shapes, tmp_path / 'w', config=config_with(tmp_path, text))
    assert_one_clear_sentence(done, f'pretrained weights {path}: nothing in this file fits ResNet')
    assert "say prefix='other.backbone' in init_cfg" in done.stderr
    assert not list((tmp_path / 'w').rglob('*.pth'))


def test_fine_tuning_from_another_architecture_is_refused(shapes, trained, tmp_path):
    done = train(shapes, tmp_path / 'w', cfg=[f'load_from={other_architecture(trained, tmp_path)}'])
    assert_one_clear_sentence(done, 'no tensor in it fits')
