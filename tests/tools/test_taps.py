"""tools/taps.py as a user runs it."""

import cv2
import pytest
import torch

from bnet_mm.cli import UserError
from helpers.tools import DEMO, SMALL, call_tool


def test_table_and_picture(with_taps, tmp_path, capsys):
    assert call_tool('taps', with_taps(DEMO, *SMALL), '--out', tmp_path / 'taps') is None
    printed = capsys.readouterr().out
    assert all(f'backbone.layer{i}.{j}.bn2' in printed for i in (1, 2, 3, 4) for j in (0, 1))
    assert printed.count(' %') == 4
    assert cv2.imread(str(tmp_path / 'taps' / 'taps.png')).std() > 10


def test_no_taps(tmp_path):
    torch.save(dict(state_dict=dict(weight=torch.zeros(3))), tmp_path / 'bn.pth')
    with pytest.raises(UserError, match='no BNET with k > 1'):
        call_tool('taps', tmp_path / 'bn.pth', '--out', tmp_path / 'taps')
    assert not (tmp_path / 'taps').exists()
