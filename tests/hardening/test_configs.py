"""Configs, options and arguments with one thing wrong, through the tools: one sentence, and nothing is ignored.

The long form: pytest -m hardening tests/hardening/test_configs.py
"""

import contextlib
import io
import os
import shutil
from unittest import mock

import pytest
from mmengine.config import Config

from bnet_mm.cli import run_tool
from helpers import toy_host, wrong_settings
from helpers.hosts import import_host_models
from helpers.tools import load_tool

CASES = list(wrong_settings.cases())


def prepare(folder):
    import_host_models('mmdet')
    (folder / 'base.py').write_text(toy_host.CONFIG)


def call(tool, *arguments):
    """What a tool prints to stderr and its exit code, 0 if it went through. Any other end is an error of this test."""
    errors = io.StringIO()
    with (
        mock.patch('sys.argv', [f'{tool}.py', *map(str, arguments)]),
        mock.patch('mmengine.runner.runner.collect_env', dict),
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            run_tool(load_tool(tool).main)
        except SystemExit as end:
            return end.code, errors.getvalue()
    return 0, errors.getvalue()


def check(case, folder):
    for left in ('work', 'new.py', 'new.pth'):
        shutil.rmtree(folder / left, ignore_errors=True)
    config = 'base.py' if case.text is None else 'config.py'
    if case.text is not None:
        (folder / config).write_text(case.text)
    arguments = [argument.replace('@', str(folder)) for argument in case.arguments]
    given = {'train': ['--work-dir', folder / 'work'], 'convert_config': ['-o', folder / 'new.py']}[case.tool]
    if given[0] in arguments:
        given = []
    code, text = call(case.tool, folder / config, *given, *arguments)
    assert code, 'went through'
    assert code in (1, 2) and 'Traceback' not in text, (code, text)
    sentence = text.strip().splitlines()[-1] if text.strip() else ''
    assert 'error: ' in text and len(text.split('error: ')[-1].strip()) > 8, text
    assert code == 2 or text.strip().startswith('error: ') or sentence.startswith('error: '), text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path)
    return tmp_path


def test_the_config_itself_is_right(folder):
    """Or the tests below would prove nothing."""
    code, text = call('train', folder / 'base.py', '--work-dir', folder / 'work')
    assert code == 0 and (folder / 'work/iter_1.pth').is_file(), text
    (folder / 'plain.py').write_text(
        f"{wrong_settings.BASE}model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18))"
    )
    code, text = call('convert_config', folder / 'plain.py', '-o', folder / 'new.py')
    assert code == 0 and Config.fromfile(folder / 'new.py').model.type == 'WithBNET' and os.path.exists('new.py'), text


@pytest.mark.parametrize('text, arguments, message', [
    (None, ['--cfg-options', 'optim_wrapper.optimizer.momentun=0.9'], "argument 'momentun'. Where: "),
    (None, ['--cfg-options', 'train_cfg.val_interval=0'], 'the training stopped: ZeroDivisionError'),
    (None, ['--cfg-options', 'env_cfg.cudnn_benchmrk=True'], 'env_cfg takes cudnn_benchmark, mp_cfg'),
    (None, ['--cfg-options', 'auto_scale_lr.enabel=True'], 'auto_scale_lr takes enable, base_batch_size, got enabel'),
    (None, ['--cfg-options', 'model.backbone.frelu=no'], "frelu must be True or False, got 'no'"),
    (None, ['--cfg-options', 'launcher=pytorch'], 'it has an option of its own, --launcher'),
    (None, ['--cfg-options', 'resume=a.pth'], "resume is True or False, got 'a.pth'; name a checkpoint with --resume"),
    (None, ['--cfg-options', 'model'], 'argument --cfg-options: takes KEY=VALUE, got model'),
    ('default_scope = "mmdet"', [], 'has no model'),
    (f'{wrong_settings.BASE}auto_scale_lr = dict(base_size=3)', [], 'auto_scale_lr takes enable, base_batch_size, got'),
])  # fmt: skip
def test_what_the_long_form_found(folder, text, arguments, message):
    """Each was a traceback, or ignored."""
    (folder / 'config.py').write_text(text or wrong_settings.BASE)
    code, errors = call('train', folder / 'config.py', '--work-dir', folder / 'work', *arguments)
    assert code in (1, 2) and message in errors.splitlines()[-1], errors
    if 'Where: ' in message:
        trace = errors.strip().rpartition('Where: ')[2]
        assert 'momentun' in open(trace).read()


def test_a_target_that_cannot_be_written(folder):
    (folder / 'plain.py').write_text(wrong_settings.PLAIN)
    code, errors = call('convert_config', folder / 'plain.py', '-o', '/proc/new.py')
    assert code == 2 and errors.startswith('error: ') and '/proc/' in errors


@pytest.mark.parametrize('every', [60, pytest.param(1, marks=pytest.mark.hardening)])
def test_one_thing_wrong_is_one_sentence(folder, every):
    failures = {}
    for case in CASES[::every]:
        try:
            check(case, folder)
        except AssertionError as error:
            failures[case.what] = str(error)[:300]
    assert not failures, '\n'.join(f'{what}: {why}' for what, why in failures.items())
    assert len(CASES) > 1000
