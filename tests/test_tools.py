"""The command-line tools as a user runs them: in their own processes, on a small generated data set."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine.utils import is_installed
from paths import REPO

pytest.importorskip('mmdet')

DEMO = 'configs/faster_rcnn_r18_bnet5_demo.py'
# Scores of an untrained detector are low; without this there would be no box to evaluate.
SMALL = [
    'model.backbone.base_channels=8', 'model.backbone.stem_channels=8', 'model.neck.in_channels=[8,16,32,64]',
    'model.test_cfg.rcnn.score_thr=0', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=4',
    'default_hooks.logger.interval=1',
]  # fmt: skip


def run(*command, **environment):
    env = {**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE', 'PYTHON': sys.executable, **environment}
    command = [str(part) for part in command]
    if command[0].endswith('.py'):
        command.insert(0, sys.executable)
    elif command[0].endswith('.sh'):
        command.insert(0, 'bash')
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'shapes'
    done = run('tools/make_toy_data.py', 'coco', folder, '--train', 16, '--val', 6, '--size', 96)
    assert done.returncode == 0, done.stderr
    return folder


def train(shapes, work_dir, *options, config=DEMO, cfg=(), tool=('tools/train.py',), gpus=()):
    arguments = [*tool, config, *gpus, '--work-dir', work_dir, *options, '--cfg-options', *SMALL, *cfg]
    return run(*arguments, DATA_ROOT=str(shapes))


def test(shapes, checkpoint, work_dir, *options, tool=('tools/test.py',), gpus=()):
    arguments = [*tool, DEMO, checkpoint, *gpus, '--work-dir', work_dir, *options, '--cfg-options', *SMALL]
    return run(*arguments, DATA_ROOT=str(shapes))


test.__test__ = False  # a helper, not a test


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """A work dir after one epoch."""
    work_dir = tmp_path_factory.mktemp('work') / 'train'
    done = train(shapes, work_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return work_dir


def scalars(work_dir):
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def metrics(work_dir):
    return json.loads(sorted(work_dir.glob('[0-9]*/[0-9]*.json'))[-1].read_text().splitlines()[-1])


def only_numbers(values):
    return {name: value for name, value in values.items() if name.startswith('coco/')}


# ---------------------------------------------------------------------------------------------------- they work


def test_train_writes_checkpoint_curve_and_evaluates(trained):
    assert (trained / 'epoch_1.pth').is_file()
    lines = scalars(trained)
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4]
    assert 'coco/bbox_mAP_50' in lines[-1]
    layers = torch.load(trained / 'epoch_1.pth', weights_only=False)['state_dict']
    assert layers['backbone.layer1.0.bn2.bnconv.weight'].shape == (8, 1, 5, 5)


def test_test_evaluates_dumps_and_draws(shapes, trained, tmp_path):
    done = test(shapes, trained / 'epoch_1.pth', tmp_path / 'test', '--out', tmp_path / 'out.pkl', '--show-dir', 'vis')
    assert done.returncode == 0, done.stderr[-3000:]
    got, want = metrics(tmp_path / 'test'), scalars(trained)[-1]
    assert got['coco/bbox_mAP_50'] == pytest.approx(want['coco/bbox_mAP_50'], abs=1e-3)
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == 6 and all(len(one['pred_instances']['scores']) > 0 for one in predictions)
    assert len(list((tmp_path / 'test').rglob('vis/*.jpg'))) == 6

    report = run('tools/report_run.py', trained, tmp_path / 'test', '--out', tmp_path / 'report')
    assert report.returncode == 0, report.stderr
    assert 'bbox_mAP_50' in report.stdout
    assert {p.name for p in (tmp_path / 'report').iterdir()} == {'curves.png', 'predictions.png'}


def test_test_time_augmentation(shapes, trained, tmp_path):
    done = test(shapes, trained / 'epoch_1.pth', tmp_path / 'test', '--tta')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'coco/bbox_mAP_50' in metrics(tmp_path / 'test')


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


def test_two_processes_without_gpu(shapes, trained, tmp_path):
    """dist_train.sh trains, and dist_test.sh gives the figures of one process."""
    two = dict(tool=('tools/dist_train.sh',), gpus=(2,), cfg=['train_dataloader.batch_size=2'])
    done = train(shapes, tmp_path / 'train', '--auto-scale-lr', **two)
    lines = scalars(tmp_path / 'train')
    assert 'LR is set based on batch size of 16 and the current batch size is 4' in done.stderr + done.stdout
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4], done.stderr[-3000:]
    assert 'coco/bbox_mAP_50' in lines[-1]
    test(shapes, trained / 'epoch_1.pth', tmp_path / 'two', tool=('tools/dist_test.sh',), gpus=(2,))
    test(shapes, trained / 'epoch_1.pth', tmp_path / 'one')
    got, want = only_numbers(metrics(tmp_path / 'two')), only_numbers(metrics(tmp_path / 'one'))
    assert want and got == pytest.approx(want, abs=1e-6)
    done = test(shapes, trained / 'epoch_1.pth', tmp_path / 'tta', '--tta', tool=('tools/dist_test.sh',), gpus=(2,))
    assert (tmp_path / 'tta').exists() and only_numbers(metrics(tmp_path / 'tta')), done.stderr[-3000:]


def test_mim_train(shapes, tmp_path):
    """The configs work without our tools: mim runs the library's own train.py."""
    pytest.importorskip('mim')
    command = [sys.executable, '-m', 'mim', 'train', 'mmdet', DEMO, '--gpus', '0', '--work-dir', tmp_path / 'w']
    done = run(*command, '--cfg-options', *SMALL, DATA_ROOT=str(shapes))
    assert (tmp_path / 'w' / 'epoch_1.pth').exists(), done.stderr[-3000:] + done.stdout[-2000:]


@pytest.mark.parametrize('tool, arguments, entry', [
    ('slurm_train.sh', ['part', 'job', 'CONFIG', '16', '--amp'],
     ['train.py', 'CONFIG', '--launcher', 'slurm', '--amp']),
    ('slurm_test.sh', ['part', 'job', 'CONFIG', 'CKPT', '4'], ['test.py', 'CONFIG', 'CKPT', '--launcher', 'slurm']),
])  # fmt: skip
def test_slurm_scripts_ask_for_the_right_job(tmp_path, tool, arguments, entry):
    """With a stand-in for srun: what is asked for and what would run on the nodes."""
    stand_in = tmp_path / 'srun'
    stand_in.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    done = run(f'tools/{tool}', *arguments, PATH=f'{tmp_path}:{os.environ["PATH"]}')
    words = done.stdout.split()
    gpus = 16 if '16' in arguments else 4
    assert f'--ntasks={gpus}' in words and f'--gres=gpu:{min(gpus, 8)}' in words and '--job-name=job' in words
    assert os.path.basename(words[-len(entry)]) == entry[0] and words[-len(entry) + 1 :] == entry[1:]


def test_toy_data_is_seeded_and_not_overwritten(shapes, tmp_path):
    options = ('--train', 16, '--val', 6, '--size', 96)
    assert run('tools/make_toy_data.py', 'coco', tmp_path / 'again', *options).returncode == 0
    for file in sorted(path for path in shapes.rglob('*') if path.is_file()):
        assert file.read_bytes() == (tmp_path / 'again' / file.relative_to(shapes)).read_bytes()
    done = run('tools/make_toy_data.py', 'coco', shapes)
    assert done.returncode != 0 and 'exists already' in done.stderr


# ------------------------------------------------------------------------------------------------- wrong commands


def config_with(tmp_path, text, imports=True):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{REPO}/{DEMO}'\n{text}\n")
    if not imports:
        path.write_text(path.read_text() + 'custom_imports = None\n')
    return path


def broken_annotations(shapes, tmp_path, change):
    root = tmp_path / 'coco'
    shutil.copytree(shapes, root)
    path = root / 'annotations' / 'instances_train2017.json'
    path.write_text(change(path.read_text()))
    return root


def other_architecture(trained, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['state_dict'] = {f'other.{name}': value for name, value in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'other.pth')
    return tmp_path / 'other.pth'


def without_a_norm(trained, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    for name in [name for name in checkpoint['state_dict'] if name.startswith('backbone.layer2.0.bn2')]:
        del checkpoint['state_dict'][name]
    torch.save(checkpoint, tmp_path / 'less.pth')
    return tmp_path / 'less.pth'


def truncated(trained, tmp_path):
    (tmp_path / 'cut.pth').write_bytes((trained / 'epoch_1.pth').read_bytes()[:5000])
    return tmp_path / 'cut.pth'


def no_checkpoint(trained, tmp_path):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    return tmp_path / 'text.pth'


BAD_TRAINING = {
    'unknown norm keyword': (
        dict(cfg=['model.neck.norm_cfg.type=BNET', 'model.neck.norm_cfg.kernel=3']), "keyword argument 'kernel'",
    ),
    'even k': (dict(cfg=['model.backbone.bnet.k=4']), 'k must be a positive odd integer, got 4'),
    'k=0': (dict(cfg=['model.backbone.bnet.k=0']), 'k must be a positive odd integer, got 0'),
    'unknown position': (dict(cfg=['model.backbone.bnet.where=D']), "no norm to replace at where='D'"),
    'unknown bnet key': (dict(cfg=['model.backbone.bnet.kk=3']), 'bnet takes k, where and dilation, got kk'),
    'unknown option': (dict(cfg=['train_dataloder.batch_size=4']), 'did you mean train_dataloader?'),
    'option without effect': (dict(cfg=['data_root=elsewhere/']), 'data_root is only a variable inside the config'),
    'late import': (dict(cfg=['custom_imports.imports=[os]']), 'put it in the config file'),
    'unknown loop option': (dict(cfg=['train_cfg.max_epoch=4']), 'max_epoch'),
    'no such config': (dict(config='configs/nothing.py'), 'configs/nothing.py cannot be read'),
    'nothing to resume': (dict(options=['--resume']), 'nothing to resume'),
    'amp without a GPU': (dict(options=['--amp']), '--amp needs a GPU'),
    'no pretrained weights': (
        dict(config='configs/faster_rcnn_r50_bnet5_1x.py', small=False),
        'pretrained weights checkpoints/R50_BNET-5.pth: does not exist',
    ),
    'resume from nowhere': (dict(options=['--resume', 'no/such.pth']), 'no/such.pth does not exist'),
}  # fmt: skip


def assert_one_clear_sentence(done, message):
    assert done.returncode not in (0, -9), done.stdout[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last, done.stderr[-3000:]
    assert 'Traceback' not in done.stderr


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


def test_leftover_keys_are_reported_and_do_not_stop_a_test(shapes, trained, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['state_dict']['data_preprocessor.mean'] = torch.zeros(3, 1, 1)
    torch.save(checkpoint, tmp_path / 'more.pth')
    done = test(shapes, tmp_path / 'more.pth', tmp_path / 'w')
    assert done.returncode == 0 and 'unexpected key in source state_dict: data_preprocessor.mean' in done.stdout


def no_tensors(trained, tmp_path):
    torch.save(dict(model=dict(weight=torch.zeros(3)), epoch=3), tmp_path / 'odd.pth')
    return tmp_path / 'odd.pth'


@pytest.mark.parametrize('make, message', [
    (no_tensors, 'odd.pth is not a checkpoint of this model'),
    (lambda trained, tmp_path: tmp_path / 'none.pth', 'none.pth does not exist'),
    (truncated, 'cut.pth is not a readable checkpoint'),
    (no_checkpoint, 'text.pth is not a readable checkpoint'),
    (other_architecture, 'other.pth is not a checkpoint of this model'),
    (without_a_norm, 'not the BNET layer after it, backbone.layer2.0.bn2'),
])  # fmt: skip
def test_bad_checkpoint(shapes, trained, tmp_path, make, message):
    checkpoint = make(trained, tmp_path)
    assert_one_clear_sentence(test(shapes, checkpoint, tmp_path / 'w'), message)


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


@pytest.mark.parametrize('tool, arguments, message', [
    ('dist_train.sh', [DEMO, '0'], 'GPUS must be a positive integer, got 0'),
    ('dist_train.sh', [DEMO, 'two'], 'GPUS must be a positive integer, got two'),
    ('dist_train.sh', [DEMO], 'usage: tools/dist_train.sh CONFIG GPUS'),
    ('dist_test.sh', [DEMO, 'a.pth', '0'], 'GPUS must be a positive integer, got 0'),
    ('slurm_train.sh', ['p', 'j', DEMO, '0'], 'GPUS must be a positive integer, got 0'),
    ('slurm_test.sh', ['p', 'j', DEMO, 'a.pth', '1'], 'srun not found'),
])  # fmt: skip
def test_bad_launch(tool, arguments, message):
    done = run(f'tools/{tool}', *arguments)
    assert done.returncode != 0 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('python, message', [
    ('#!/bin/sh\necho 3.9\n', 'constraints.txt is for Python 3.11'),
    ('#!/bin/sh\nexit 1\n', 'does not run'),
])  # fmt: skip
def test_installer_names_what_is_wrong(tmp_path, python, message):
    """In an empty copy, with a stand-in for the interpreter."""
    (tmp_path / 'tools').mkdir()
    for name in ('tools/dev/install.sh', 'constraints.txt', 'setup.py'):
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(REPO / 'bnet_mm' / 'ops' / 'csrc', tmp_path / 'bnet_mm' / 'ops' / 'csrc')
    (tmp_path / 'python').write_text(python)
    (tmp_path / 'python').chmod(0o755)
    done = run(tmp_path / 'tools' / 'install.sh', PYTHON=str(tmp_path / 'python'))
    assert done.returncode != 0 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / '.venv').exists()


@pytest.fixture
def segmentation(tmp_path):
    """Data and config of a PSPNet with BNET in its backbone; of the norms elsewhere, the type is an argument."""
    if not is_installed('mmsegmentation'):
        pytest.skip('mmengine finds mmseg:: configs only under the distribution name mmsegmentation')
    generator = np.random.default_rng(0)
    for folder, high, shape in (('images', 256, (32, 32, 3)), ('masks', 2, (32, 32))):
        (tmp_path / folder).mkdir()
        for i in range(4):
            cv2.imwrite(str(tmp_path / folder / f'{i}.png'), generator.integers(0, high, shape).astype(np.uint8))

    def config(norm):
        (tmp_path / 'psp.py').write_text(f"""
_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False)
norm = dict(type='{norm}')
head = dict(num_classes=2, norm_cfg=norm)
model = dict(
    pretrained=None, data_preprocessor=dict(size=(32, 32)), decode_head=head, auxiliary_head=head,
    backbone=dict(type='WithBNET', base='ResNetV1c', bnet=dict(k=3), norm_cfg=norm),
)
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='Resize', scale=(32, 32)),
            dict(type='PackSegInputs')]
loader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        _delete_=True, type='BaseSegDataset', data_root='{tmp_path}', img_suffix='.png', seg_map_suffix='.png',
        data_prefix=dict(img_path='images', seg_map_path='masks'), metainfo=dict(classes=('a', 'b')), pipeline=pipeline,
    ),
)
train_dataloader = val_dataloader = test_dataloader = loader
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
""")
        return tmp_path / 'psp.py'

    return config


def test_one_entry_serves_mmseg_configs_too(segmentation, tmp_path):
    """A PSPNet with BNET, trained and evaluated by the same two tools."""
    config = segmentation('BN')
    done = run('tools/train.py', config, '--work-dir', tmp_path / 'w')
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(
        'tools/test.py', config, tmp_path / 'w' / 'iter_2.pth', '--work-dir', tmp_path / 't', '--show-dir', 'vis'
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'mIoU' in metrics(tmp_path / 't')
    assert len(list((tmp_path / 't' / 'vis').rglob('*.png'))) == 4


def test_synchronised_batch_norm_in_two_processes_without_gpu(segmentation, tmp_path):
    """As mmseg's configs have it: with one image in each process, and a checkpoint for torch's SyncBatchNorm."""
    config = segmentation('SyncBN')
    done = run('tools/dist_train.sh', config, 2, '--work-dir', tmp_path / 'w', '--cfg-options',
               'train_dataloader.batch_size=1')  # fmt: skip
    assert [line['step'] for line in scalars(tmp_path / 'w') if 'loss' in line] == [1, 2], done.stderr[-3000:]
    state_dict = torch.load(tmp_path / 'w' / 'iter_2.pth', weights_only=False)['state_dict']
    layer, prefix = torch.nn.SyncBatchNorm(128), 'decode_head.bottleneck.bn.'
    layer.load_state_dict({name[len(prefix) :]: v for name, v in state_dict.items() if name.startswith(prefix)})
    assert layer.num_batches_tracked == 2 and layer.running_mean.any()
    done = run('tools/test.py', config, tmp_path / 'w' / 'iter_2.pth', '--work-dir', tmp_path / 't')
    assert done.returncode == 0 and 'mIoU' in metrics(tmp_path / 't'), done.stderr[-3000:]
    assert scalars(tmp_path / 'w')[-1]['mIoU'] == pytest.approx(metrics(tmp_path / 't')['mIoU'], abs=0.01)
