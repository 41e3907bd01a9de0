"""Where a run goes on, also after a kill at the worst moment."""

import os

import pytest
import torch

from bnet_mm.checkpoint.latest import latest_checkpoint


@pytest.fixture
def work_dir(tmp_path):
    """iter_1 and iter_2 complete, iter_3 cut off, then the weights of the best one."""
    for seconds, name in enumerate(['iter_1', 'iter_2', 'iter_3', 'best_acc_iter_2']):
        path = tmp_path / f'{name}.pth'
        torch.save(dict(state_dict={}, name=name), path)
        if name == 'iter_3':
            path.write_bytes(path.read_bytes()[:-30])
        os.utime(path, (seconds, seconds))
    return tmp_path


@pytest.mark.parametrize(
    ('note', 'expected'),
    [
        (None, None),
        ('{here}/iter_1.pth', 'iter_1.pth'),
        ('{here}/iter_1.pth\n', 'iter_1.pth'),
        ('/elsewhere/iter_1.pth', 'iter_1.pth'),  # the folder was moved
        ('', 'iter_2.pth'),  # killed while the note was written
        ('{here}/iter_0.pth', 'iter_2.pth'),  # killed after iter_0 was removed
    ],
)
def test_the_checkpoint_to_go_on_from(work_dir, note, expected):
    if note is not None:
        (work_dir / 'last_checkpoint').write_text(note.format(here=work_dir))
    assert latest_checkpoint(work_dir) == (expected and work_dir / expected)


def test_nothing_complete(tmp_path):
    (tmp_path / 'last_checkpoint').touch()
    (tmp_path / 'iter_1.pth').write_bytes(b'PK half a file')
    assert latest_checkpoint(tmp_path) is None
