"""The scripts for several processes and for clusters."""

import os
import sys

import pytest
import torch

from helpers.paths import REPO
from helpers.tools import DEMO, evaluate, metrics, only_numbers, run, scalars, train
from helpers.toy_host import CONFIG


def test_two_processes_without_gpu(shapes, trained, tmp_path):
    """dist_train.sh trains, and dist_test.sh gives the figures of one process."""
    two = dict(tool=('tools/dist_train.sh',), gpus=(2,), cfg=['train_dataloader.batch_size=2'])
    done = train(shapes, tmp_path / 'train', '--auto-scale-lr', **two)
    lines = scalars(tmp_path / 'train')
    assert 'LR is set based on batch size of 16 and the current batch size is 4' in done.stderr + done.stdout
    assert [line['step'] for line in lines if 'loss' in line] == [1, 2, 3, 4], done.stderr[-3000:]
    assert 'coco/bbox_mAP_50' in lines[-1]
    evaluate(shapes, trained / 'epoch_1.pth', tmp_path / 'two', tool=('tools/dist_test.sh',), gpus=(2,))
    evaluate(shapes, trained / 'epoch_1.pth', tmp_path / 'one')
    got, want = only_numbers(metrics(tmp_path / 'two')), only_numbers(metrics(tmp_path / 'one'))
    assert want and got == pytest.approx(want, abs=1e-6)
    done = evaluate(shapes, trained / 'epoch_1.pth', tmp_path / 'tta', '--tta', tool=('tools/dist_test.sh',), gpus=(2,))
    assert (tmp_path / 'tta').exists() and only_numbers(metrics(tmp_path / 'tta')), done.stderr[-3000:]


@pytest.mark.parametrize('tool, arguments, entry', [
    ('slurm_train.sh', ['part', 'job', DEMO, '16', '--amp'],
     ['train.py', DEMO, '--launcher', 'slurm', '--amp']),
    ('slurm_test.sh', ['part', 'job', DEMO, 'https://host/a.pth', '4'],
     ['test.py', DEMO, 'https://host/a.pth', '--launcher', 'slurm']),
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


@pytest.mark.hardening
def test_strategies_in_two_processes(tmp_path):
    """FlexibleRunner under torchrun: sharded weights give the losses of copied ones."""
    pytest.importorskip('mmdet')
    data = 'dict(batch_size=1, dataset=dict(size=64, length=4))'
    losses = {}
    strategies = {
        'DDP': "type='DDPStrategy'",
        'FSDP': "type='FSDPStrategy'",
        'taps apart': "type='FSDPStrategy', model_wrapper=dict(auto_wrap_policy=dict(type='torch.distributed.fsdp.wrap."
        "size_based_auto_wrap_policy', min_num_params=1))",
    }
    for strategy, options in strategies.items():
        config, work_dir = tmp_path / f'{strategy}.py', tmp_path / strategy
        config.write_text(
            f"{CONFIG}\nrunner_type = 'FlexibleRunner'\nstrategy = dict({options})\n"
            f'train_dataloader.update({data})\nval_dataloader.update({data})\ntrain_cfg.update(max_iters=2)\n'
            "train_dataloader['dataset']['type'] = val_dataloader['dataset']['type'] = 'ToyImages'\n"
            "default_hooks['logger']['interval'] = 1\n"
        )
        torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2]
        done = run(*torchrun, 'tools/train.py', config, '--launcher', 'pytorch', '--work-dir', work_dir,
                   PYTHONPATH=f'{REPO}/tests:{REPO}', OMP_NUM_THREADS='1')  # fmt: skip
        losses[strategy] = [line['loss'] for line in scalars(work_dir) if 'loss' in line]
        assert len(losses[strategy]) == 2, done.stderr[-3000:]
    for strategy in ('FSDP', 'taps apart'):
        assert losses[strategy] == pytest.approx(losses['DDP'], rel=1e-4), strategy
