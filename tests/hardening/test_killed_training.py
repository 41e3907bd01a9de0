"""SIGKILL at random moments of a training, often while a checkpoint is written: it resumes, and ends as it would have.

The long form: pytest -m hardening tests/hardening/test_killed_training.py -rP
"""

import json

import pytest

from helpers.tools import python


@pytest.mark.parametrize('kills', [2, pytest.param(20, marks=pytest.mark.hardening)])
def test_killed_training_ends_with_the_loss_of_the_undisturbed_one(tmp_path, kills):
    pytest.importorskip('mmdet')
    code = 'import sys; from helpers.killed_training import main; main(sys.argv[1], int(sys.argv[2]))'
    done = python(code, tmp_path, kills, OMP_NUM_THREADS='1')
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.rpartition('RESULT ')[2])
    print(result)
    assert len(result['kills']) == kills
    for kill in result['kills']:
        assert kill['code'] == 0 and kill['difference'] <= 1e-6 and kill['equal'], (
            kill,
            (tmp_path / 'log.txt').read_text(),
        )
    assert kills < 20 or sum(kill['writing'] for kill in result['kills']) >= 4
