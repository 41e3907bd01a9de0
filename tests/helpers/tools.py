"""The command-line tools, and other code, in their own processes."""

import importlib.util
import json
import os
import subprocess
import sys
from unittest.mock import patch

import torch

from helpers.paths import REPO

DEMO = 'configs/faster_rcnn_r18_bnet5_demo.py'
# Scores of an untrained detector are low; without this there would be no box to evaluate.
SMALL = [
    'model.backbone.base_channels=8', 'model.backbone.stem_channels=8', 'model.neck.in_channels=[8,16,32,64]',
    'model.test_cfg.rcnn.score_thr=0', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=4',
    'default_hooks.logger.interval=1',
]  # fmt: skip


def run(*command, **environment):
    """A command, from the root of the repository; the finished process."""
    env = {**os.environ, 'OMP_WAIT_POLICY': 'PASSIVE', 'PYTHON': sys.executable, **environment}
    command = [str(part) for part in command]
    if command[0].endswith('.py'):
        command.insert(0, sys.executable)
    elif command[0].endswith('.sh'):
        command.insert(0, 'bash')
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=600)


def python(code, *arguments, cwd=None, **environment):
    """Run code in a fresh process that finds the package and these helpers; the finished process."""
    paths = [str(REPO / 'tests'), str(REPO), os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths)), **environment}
    command = [sys.executable, '-c', code, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def load_tool(name):
    """A fresh module from tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, REPO / 'tools' / f'{name}.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def call_tool(name, *arguments):
    """A tool in this process, which saves importing torch: what it exits with, None if all went well."""
    with patch.object(sys, 'argv', [f'{name}.py', *map(str, arguments)]):
        try:
            return load_tool(name).main()
        except SystemExit as end:
            return end.code


def train(shapes, work_dir, *options, config=DEMO, cfg=(), tool=('tools/train.py',), gpus=()):
    arguments = [*tool, config, *gpus, '--work-dir', work_dir, *options, '--cfg-options', *SMALL, *cfg]
    return run(*arguments, DATA_ROOT=str(shapes))


def evaluate(shapes, checkpoint, work_dir, *options, tool=('tools/test.py',), gpus=()):
    arguments = [*tool, DEMO, checkpoint, *gpus, '--work-dir', work_dir, *options, '--cfg-options', *SMALL]
    return run(*arguments, DATA_ROOT=str(shapes))


def scalars(work_dir):
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def metrics(work_dir):
    """Of the last test, as the first process has written them."""
    files = [path for path in work_dir.glob('[0-9]*/[0-9]*.json') if path.stem == path.parent.name]
    return json.loads(max(files).read_text().splitlines()[-1])


def only_numbers(values):
    return {name: value for name, value in values.items() if name.startswith('coco/')}


def config_with(tmp_path, text, imports=True):
    path = tmp_path / 'config.py'
    path.write_text(f"_base_ = '{REPO}/{DEMO}'\n{text}\n")
    if not imports:
        path.write_text(path.read_text() + 'custom_imports = None\n')
    return path


def assert_one_clear_sentence(done, message):
    assert done.returncode not in (0, -9), done.stdout[-2000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last, done.stderr[-3000:]
    assert 'Traceback' not in done.stderr


def other_architecture(trained, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['state_dict'] = {f'other.{name}': value for name, value in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'other.pth')
    return tmp_path / 'other.pth'
