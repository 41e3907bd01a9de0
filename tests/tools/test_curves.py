"""tools/curves.py as a user runs it."""

import pytest

from bnet_mm.cli import UserError
from helpers.tools import call_tool
from visualization.test_runs import step, write_run


def test_three_files(tmp_path):
    lines = [step(10, 3.0, 1), {'coco/bbox_mAP': 0.1, 'coco/bbox_mAP_50': 0.2, 'step': 1}]
    for name, seed in (('bn', 0), ('bn', 1), ('bnet', 0)):
        write_run(tmp_path / f'{name} {seed}', lines, name=name, seed=seed, lr=len(name))
    folders = sorted(tmp_path.iterdir())
    assert call_tool('curves', *folders, '--out', tmp_path / 'o', '--metric', 'coco/bbox_mAP_50') is None
    assert {path.name for path in (tmp_path / 'o').iterdir()} == {'curves.png', 'curves.svg', 'curves.csv'}
    assert 'coco/bbox_mAP_50' in (tmp_path / 'o' / 'curves.csv').read_text()
    with pytest.raises(UserError, match='--metric mIoU: there is none; there are coco/bbox_mAP, coco/bbox_mAP_50'):
        call_tool('curves', folders[0], '--out', tmp_path / 'o', '--metric', 'mIoU')


def test_a_run_without_losses(tmp_path):
    write_run(tmp_path, [])
    with pytest.raises(UserError, match='no loss was logged'):
        call_tool('curves', tmp_path, '--out', tmp_path / 'o')
