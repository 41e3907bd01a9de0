"""Checkpoints that try to run code, by all ways in: none runs. The long form: pytest -m hardening ... -rP"""

import collections
import os
import warnings
from unittest import mock

import pytest
from mmengine.runner import load_checkpoint

from hardening.test_checkpoints import CLEAR, WAYS
from helpers import damage, hostile


def by_mmengine(kind, path):
    net = damage.Net(kind)
    load_checkpoint(net, path, map_location='cpu')


def try_all(path, mark, data, counts, ways=(*WAYS, by_mmengine)):
    with open(path, 'wb') as file:
        file.write(data)
    for way in ways:
        try:
            with warnings.catch_warnings(), mock.patch('mmengine.runner.checkpoint.print_log'):
                warnings.simplefilter('ignore')
                way('BNET', str(path))
            counts['loaded, nothing executed'] += 1
        except CLEAR as error:
            assert str(error).strip() and 'Traceback' not in str(error)
            counts['refused'] += 1
        assert not mark.exists(), f'executed by {way.__name__}'
    counts['checkpoints'] += 1


@pytest.fixture
def mark(tmp_path):
    """The folder that the pickles would make."""
    return tmp_path / 'executed'


def test_objects(tmp_path, mark):
    """In every place of a checkpoint, in the one format or the other."""
    counts = collections.Counter()
    state_dict = damage.make('BNET', 0)
    for name, evil in hostile.objects(mark).items():
        for i, put in enumerate(hostile.PLACES.values()):
            try:
                data = damage.saved(put(state_dict, evil), legacy=(i + len(name)) % 2 == 0)
            except (TypeError, AttributeError):  # pickle cannot write it
                continue
            ways = WAYS if name == 'os.mkdir' else (WAYS[i % len(WAYS)], by_mmengine)
            try_all(tmp_path / 'a.pth', mark, data, counts, ways)
    print(dict(counts))
    assert counts['checkpoints'] > 120


@pytest.mark.parametrize('container', hostile.CONTAINERS)
def test_opcodes(tmp_path, mark, container):
    counts = collections.Counter()
    for raw in hostile.RAW.values():
        data = hostile.CONTAINERS[container](raw.replace(b'%s', str(mark).encode()))
        try_all(tmp_path / 'a.pth', mark, data, counts)
    print(dict(counts))
    assert counts['checkpoints'] == len(hostile.RAW) and not counts['loaded, nothing executed']


def test_the_payloads_do_execute_in_a_plain_pickle(mark):
    """Or the tests above would prove nothing."""
    import pickle

    for raw in ('GLOBAL, REDUCE', 'Python 2 name', 'INST', 'OBJ', 'STACK_GLOBAL', 'dotted', 'through torch', 'memo'):
        pickle.loads(hostile.RAW[raw].replace(b'%s', str(mark).encode()))
        mark.rmdir()
    for name in ('os.mkdir', 'eval', 'exec', 'subprocess', 'pickle.loads', 'object array'):
        pickle.loads(pickle.dumps(hostile.objects(mark)[name]))
        os.rmdir(mark)


@pytest.mark.parametrize('examples', [60, pytest.param(1500, marks=pytest.mark.hardening)])
def test_random_programs(tmp_path, mark, examples):
    counts = collections.Counter()
    for seed in range(examples):
        rng = damage.random_of('program', seed)
        container = rng.choice(list(hostile.CONTAINERS.values()))
        try_all(tmp_path / 'a.pth', mark, container(hostile.program(mark, rng)), counts, rng.sample(WAYS, 2))
    print(dict(counts))
