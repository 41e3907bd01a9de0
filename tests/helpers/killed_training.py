"""Trainings that are killed and resumed; run in a process of its own, which forks one for each training."""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import mmengine.runner.runner
import torch

import bnet_mm.host.compat  # noqa: F401
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from helpers import toy_host
from helpers.hosts import import_host_models
from helpers.paths import REPO
from helpers.tools import call_tool

ITERATIONS = 10
OPTIONS = [
    f'train_cfg.max_iters={ITERATIONS}', 'train_cfg.val_interval=5', 'train_dataloader.dataset.length=6',
    'default_hooks.logger.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=2',
    'model.ballast=3000000',  # 12 MB, so that most of the time goes into writing checkpoints
]  # fmt: skip


def start(folder, *arguments):
    """Fork a process that trains as tools/train.py does, on one thread."""
    child = os.fork()
    if child:
        return child
    code = 9
    try:
        log = os.open(folder.parent / 'log.txt', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        config = folder.parent / 'base.py'
        code = call_tool('train', config, '--work-dir', folder, *arguments, '--cfg-options', *OPTIONS)
        code = 0 if code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def trained(folder, *arguments):
    return os.waitstatus_to_exitcode(os.waitpid(start(folder, *arguments), 0)[1])


def result(folder):
    """The loss of the last step that any run in the folder logged, and the last checkpoint's weights."""
    lines = [line for file in folder.glob('*/vis_data/scalars.json') for line in file.read_text().splitlines()]
    losses = {line['step']: line['loss'] for line in map(json.loads, lines) if 'loss' in line}
    return losses[ITERATIONS], load_checkpoint_file(str(folder / f'iter_{ITERATIONS}.pth'))['state_dict']


def kill(folder, seconds, rng):
    """SIGKILL at a random moment, every second time in the midst of writing a checkpoint; says whether it was then."""
    child = start(folder)
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.05, 1) * seconds)
    else:
        path, end = folder / f'iter_{rng.randint(1, ITERATIONS)}.pth', time.time() + 60
        while not path.exists() and time.time() < end:
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.004))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in folder.glob('*.pth'):
        try:
            load_checkpoint_file(str(path))
        except RuntimeError:
            return True
    return False


def main(folder, kills, seed=0):
    """Print, as JSON, what each of these trainings came to."""
    sys.path.append(str(REPO / 'tools'))  # where a tool looks for its neighbours
    import_host_models('mmdet')
    mmengine.runner.runner.collect_env = dict  # seconds, each time, for a line in the log
    torch.set_num_threads(1)
    folder, rng = Path(folder), random.Random(seed)
    (folder / 'base.py').write_text(toy_host.CONFIG)
    begin = time.time()
    assert trained(folder / 'undisturbed') == 0, (folder / 'log.txt').read_text()[-3000:]
    seconds = time.time() - begin
    loss, weights = result(folder / 'undisturbed')
    done = []
    for i in range(kills):
        work = folder / f'killed{i}'
        writing = kill(work, seconds, rng)
        complete = (work / 'last_checkpoint').exists()
        code = trained(work, *(['--resume'] if complete else []))  # else there is nothing to resume: it starts again
        found = result(work) if code == 0 else (float('nan'), {})
        equal = all(torch.equal(value, found[1].get(name)) for name, value in weights.items()) if code == 0 else False
        done.append(dict(writing=writing, resumed=complete, code=code, difference=abs(found[0] - loss), equal=equal))
    print('RESULT', json.dumps(dict(loss=loss, seconds=seconds, kills=done)))
    sys.stdout.flush()
