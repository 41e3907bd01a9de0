"""Damaged and shuffled checkpoints by all ways in: the function that the file says, or a clear error.

Each example is a random net, something done to its state dict and to the bytes of its file, both drawn from a seed that
hypothesis draws and, if it fails, prints; it is derandomised, so that every run has the same examples. The long form:
pytest -m hardening tests/hardening/test_checkpoints.py -rP
"""

import collections
import logging
import os
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.runner import CheckpointLoader

from bnet_mm.checkpoint.convert import convert_file
from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from bnet_mm.cli import UserError
from bnet_mm.engine.runner import CheckedRunner, load_complete
from helpers import damage

CLEAR = (CheckpointError, RuntimeError, UserError, FileNotFoundError)


def by_file(kind, path):
    """load_checkpoint_file and a strict load_state_dict."""
    net = damage.Net(kind)
    checkpoint = load_checkpoint_file(path)
    net.load_state_dict(checkpoint.get('state_dict', checkpoint))
    return net


def by_loader(kind, path):
    net = damage.Net(kind)
    checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    net.load_state_dict(checkpoint.get('state_dict', checkpoint))
    return net


def by_complete(kind, path):
    net = damage.Net(kind)
    load_complete(net, path)
    return net


def by_runner(kind, path, strict=True):
    """As --resume and tools/test.py."""
    runner = object.__new__(CheckedRunner)
    runner.model, runner.logger, runner._hooks = damage.Net(kind), logging.getLogger('nowhere'), []
    runner.strict_loading = strict
    runner.load_checkpoint(path)
    return runner.model


def by_load_from(kind, path):
    """Not strict: mmengine says what does not fit."""
    return by_runner(kind, path, strict=False)


def by_pretrained(kind, path):
    """Likewise."""
    net = damage.Net(kind, dict(type='Pretrained', checkpoint=path))
    net.init_weights()
    return net


def by_conversion(kind, path):
    """Of a released layout; any other is refused."""
    target = f'{path}.converted'
    try:
        convert_file(path, target)
        if not os.path.exists(target):
            raise CheckpointError('unmatched keys: nothing was written')
        return by_file(kind, target)
    finally:
        if os.path.exists(target):
            os.remove(target)


STRICT = (by_file, by_loader, by_complete, by_runner, by_conversion)
WAYS = (*STRICT, by_load_from, by_pretrained)


def outcome(way, kind, path, data, fresh):
    """What became of it, in a word; an assertion fails for a wrong load or an error that is not clear."""
    said = []
    try:
        with mock.patch('mmengine.runner.checkpoint.print_log', lambda text, **_: said.append(text)):
            torch.manual_seed(0)
            net = way(kind, path).eval()
    except CLEAR as error:
        assert str(error).strip() and 'Traceback' not in str(error)
        return 'clear error'
    state_dict = damage.reading(data)
    assert isinstance(state_dict, dict), f'{way.__name__} read a file that says nothing: {state_dict}'
    torch.manual_seed(0)
    text = '\n'.join(said)
    want, missing = damage.expected(kind, state_dict, text)
    assert way not in STRICT or not missing, f'{way.__name__} went on without {missing}'
    assert all(name in text for name in missing), f'{way.__name__} went on without {missing} and said {text!r}'
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(net(x), want(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    if missing:
        return 'loaded in part, and said so'
    if data is fresh or _same(state_dict, damage.reading(fresh)):
        return 'equal function'
    return 'the function of the file, which has no checksum' if data[:2] != b'PK' else 'the function of the file'


def _same(one, other):
    return one.keys() == other.keys() and all(
        isinstance(value, torch.Tensor) and torch.equal(value, other[name]) for name, value in one.items()
    )


def try_one(path, kind, seed, harmless, damages, byte_damage, legacy, counts):
    rng = damage.random_of(kind, seed)
    state_dict = damage.make(kind, seed % 5)
    kinds, change = damage.HARMLESS[harmless]
    must_load = kind in kinds and not damages and not byte_damage
    if kind in kinds:
        state_dict = change(state_dict, rng)
    try:
        for step in damages:
            if state_dict:
                step(state_dict, rng)
        fresh = data = damage.saved(damage.wrapped(state_dict, rng), legacy)
    except (AttributeError, IndexError, TypeError, RuntimeError):
        return  # not every damage can follow every other, and not every tensor can be written
    if byte_damage:
        data = byte_damage(fresh, rng)
    with open(path, 'wb') as file:
        file.write(data)
    for way in WAYS:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            word = outcome(way, kind, path, data, fresh)
        counts[word] += 1
        if must_load and way is not by_conversion:
            assert word == 'equal function', (way.__name__, word)
    counts['checkpoints'] += 1


@pytest.mark.parametrize('examples', [40, pytest.param(2800, marks=pytest.mark.hardening)])
def test_every_outcome_is_the_files_function_or_a_clear_error(tmp_path, examples):
    counts = collections.Counter()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # making a failing example smaller would take much longer than to find it
    )
    @given(
        kind=st.sampled_from(sorted(damage.KINDS)),
        seed=st.integers(0, 10**6),
        harmless=st.sampled_from(sorted(damage.HARMLESS)),
        damages=st.lists(st.sampled_from(damage.DAMAGES), max_size=2),
        byte_damage=st.sampled_from((None, *damage.BYTES)),
        legacy=st.booleans(),
    )
    def run(**example):
        try_one(str(tmp_path / 'a.pth'), counts=counts, **example)

    run()
    print(dict(counts))
    assert counts['checkpoints'] > 0.75 * examples
    assert counts['equal function'] > examples / 10 and counts['clear error'] > examples
