"""Checkpoint files are read, never executed."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader

from bnet_mm.checkpoint.layouts import CheckpointError
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from helpers.pickles import Exploit


class GetAttr:
    """Pickles as getattr(target, name): allowed for HistoryBuffer's own statistics, for nothing else."""

    def __init__(self, target, name):
        self.target, self.name = target, name

    def __reduce__(self):
        return getattr, (self.target, self.name)


def mmengine_checkpoint():
    history = HistoryBuffer()
    for value in (3.0, 2.5, 1.0):
        history.update(value)
    return dict(
        meta=dict(epoch=1, iter=3, seed=np.int64(7), dataset_meta=dict(classes=('a', 'b'), palette=[(1, 2, 3)])),
        state_dict=dict(weight=torch.randn(3, 2)),
        message_hub=dict(log_scalars={'train/loss': history}, runtime_info=dict(iter=3, rate=np.float64(0.5))),
        optimizer=dict(state={0: dict(momentum_buffer=torch.randn(3, 2))}, param_groups=[dict(lr=0.1, params=[0])]),
    )


@pytest.mark.parametrize('zip_format', [True, False])
@pytest.mark.parametrize('load', [load_checkpoint_file, CheckpointLoader.load_checkpoint])
def test_what_mmengine_writes_is_read(tmp_path, load, zip_format):
    checkpoint = mmengine_checkpoint()
    torch.save(checkpoint, tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
    got = load(str(tmp_path / 'a.pth'), map_location='cpu')
    assert torch.equal(got['state_dict']['weight'], checkpoint['state_dict']['weight'])
    assert got['meta'] == checkpoint['meta']
    history = got['message_hub']['log_scalars']['train/loss']
    assert history.mean() == pytest.approx(6.5 / 3) and history.statistics('min') == 1.0


@pytest.mark.parametrize('zip_format', [True, False])
def test_a_checkpoint_that_executes_code_is_refused_and_not_executed(tmp_path, zip_format):
    path, mark = tmp_path / 'evil.pth', tmp_path / 'executed'
    torch.save(dict(state_dict={}, extra=Exploit(mark)), path, _use_new_zipfile_serialization=zip_format)
    for load in (load_checkpoint_file, CheckpointLoader.load_checkpoint):
        with pytest.raises(CheckpointError, match=r'refused and not executed.*mkdir.*If you trust its source'):
            load(str(path))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Exploit(mark)))
    assert mark.exists()  # the pickle really is one that executes


@pytest.mark.parametrize('target, name', [
    (HistoryBuffer, 'register_statistics'), (HistoryBuffer, '__init__'), (torch.Size, 'count'), (np.ndarray, 'dump'),
])  # fmt: skip
def test_getattr_serves_history_buffers_statistics_only(tmp_path, target, name):
    torch.save(dict(state_dict={}, extra=GetAttr(target, name)), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='refused and not executed.*getattr'):
        load_checkpoint_file(str(tmp_path / 'a.pth'))


def test_allow_list_does_not_leak_into_plain_torch_load(tmp_path):
    torch.save(mmengine_checkpoint(), tmp_path / 'a.pth')
    load_checkpoint_file(str(tmp_path / 'a.pth'))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'a.pth', weights_only=True)


@pytest.mark.parametrize('content, message', [
    (None, 'does not exist'), (b'', 'not a readable checkpoint'), (b'hello, this is no checkpoint\n' * 40, 'readable'),
    (b'\x80\x04 nonsense' * 40, 'no torch file .Unsupported operand 32.$'),
    ('truncated', 'not a readable checkpoint'), ('tensor', 'holds a Tensor, not a dict'),
])  # fmt: skip
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    path = tmp_path / 'a.pth'
    if content == 'tensor':
        torch.save(torch.zeros(2), path)
    elif content == 'truncated':
        torch.save(dict(state_dict=dict(weight=torch.randn(1000))), path)
        path.write_bytes(path.read_bytes()[:2000])
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((CheckpointError, FileNotFoundError), match=message) as error:
        load_checkpoint_file(str(path))
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('scheduler', [
    dict(type='OneCycleLR', eta_max=0.1, total_steps=10), dict(type='MultiStepLR', milestones=[2]),
    dict(type='CosineAnnealingLR', T_max=5), dict(type='LinearLR', start_factor=0.1), dict(type='PolyLR', power=0.9),
    dict(type='ExponentialLR', gamma=0.5), dict(type='StepLR', step_size=2), dict(type='ConstantLR'),
    dict(type='CosineRestartLR', periods=[2, 2], restart_weights=[1, 1], eta_min=0.01),
    dict(type='ReduceOnPlateauLR', monitor='loss'),
])  # fmt: skip
def test_states_of_all_schedulers_are_read(tmp_path, scheduler):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    built = PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))
    torch.save(dict(param_schedulers=[built.state_dict()]), tmp_path / 'a.pth')
    got = load_checkpoint_file(str(tmp_path / 'a.pth'))['param_schedulers'][0]
    assert got.keys() == built.state_dict().keys()


def test_damaged_files_end_in_one_sentence(tmp_path):
    """A hundred checkpoints, each with a few bytes overwritten."""
    path, generator = tmp_path / 'a.pth', np.random.default_rng(0)
    torch.save(mmengine_checkpoint(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    refused = 0
    for _ in range(100):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 4):
            damaged[position] = generator.integers(0, 256)
        path.write_bytes(damaged)
        try:
            load_checkpoint_file(str(path))
        except CheckpointError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 30


@pytest.mark.parametrize('load', [load_checkpoint_file, CheckpointLoader.load_checkpoint])
def test_a_changed_number_is_seen_by_its_checksum(tmp_path, load):
    """torch.load does not look at the checksums of its own files."""
    path, values = tmp_path / 'a.pth', torch.arange(1000.0)
    torch.save(dict(state_dict=dict(weight=values)), path)
    data = bytearray(path.read_bytes())
    data[data.find(values.numpy().tobytes()) + 401] ^= 64
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)['state_dict']['weight'], values)
    with pytest.raises(CheckpointError, match='a.pth is not a readable checkpoint: it is damaged.*CRC'):
        load(str(path))


def test_a_file_saved_without_checksums_is_read(tmp_path):
    if not hasattr(torch.serialization, 'set_crc32_options'):
        pytest.skip('this torch always writes them')
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(state_dict=dict(weight=torch.ones(3))), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_checkpoint_file(str(tmp_path / 'a.pth'))['state_dict']['weight'].sum() == 3


@pytest.mark.parametrize('checkpoint, message', [
    ({'state_dict': [1, 2]}, 'holds a list, not a dict'), ({'state_dict': None}, 'holds a NoneType'),
    ({'state_dict': {1: torch.ones(1)}}, '1 is no name of a tensor'), ({('a', 1): 2}, 'is no name of a tensor'),
])  # fmt: skip
def test_what_is_no_state_dict(tmp_path, checkpoint, message):
    torch.save(checkpoint, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_file(str(tmp_path / 'a.pth'))
