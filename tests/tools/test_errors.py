"""tools/errors.py as a user runs it."""

import csv
import json

import cv2
import numpy as np
import pytest

from bnet_mm.cli import UserError
from helpers.tools import call_tool
from visualization.test_detections import RIGHT, annotations, results, with_error


@pytest.fixture
def files(tmp_path):
    (tmp_path / 'truth.json').write_text(json.dumps(annotations(images=2)))
    one = results(RIGHT, 1) + results(RIGHT, 2)
    for name, found in (('one', one), ('other', with_error('E_miss') + results(RIGHT, 2))):
        (tmp_path / f'{name}.json').write_text(json.dumps(found))
    for image in (1, 2):
        cv2.imwrite(str(tmp_path / f'{image}.jpg'), np.full((150, 150, 3), 99, np.uint8))
    return tmp_path


def test_two_models(files, capsys):
    pytest.importorskip('tidecv')
    out = files / 'out'
    done = call_tool(
        'errors', files / 'truth.json', files / 'one.json', files / 'other.json', '--images', files, '--out', out,
        '--pictures', 1,
    )  # fmt: skip
    assert done is None
    assert sorted(path.name for path in out.iterdir()) == [
        '01_1.png', 'errors.csv', 'errors.png', 'precision_recall.png'
    ]  # fmt: skip
    one, other = csv.DictReader((out / 'errors.csv').open())
    assert one['model'] == 'one' and float(one['AP_50']) == pytest.approx(100)
    assert float(other['E_miss']) == pytest.approx(100 - float(other['AP_50'])) and float(other['E_miss']) > 5
    assert f'({float(other["AP_50"]) - 100:+.1f})' in capsys.readouterr().out


def test_what_is_refused(files):
    truth, one = files / 'truth.json', files / 'one.json'
    for arguments, message in (
        ((truth, one, one), 'the models need names of their own, got one, one'),
        ((one, one), 'annotations .*one.json cannot be read'),
        ((truth, truth), 'predictions .*truth.json cannot be read'),
    ):
        with pytest.raises(UserError, match=message):
            call_tool('errors', *arguments, '--out', files / 'out')
    assert not (files / 'out').exists()
