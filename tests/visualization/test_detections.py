"""Error analysis on a set whose errors are known, one of each kind; matching, curves, order of the pictures."""

import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip('pycocotools')

from bnet_mm.cli import UserError  # noqa: E402
from bnet_mm.visualization.detections import (  # noqa: E402
    draw_precision_recall,
    evaluated,
    matches,
    read_annotations,
    read_detections,
)
from bnet_mm.visualization.errors import draw_errors, tide_errors  # noqa: E402
from bnet_mm.visualization.side_by_side import by_difference, draw_side_by_side  # noqa: E402

A, B = 3, 7  # ids of categories
# Two objects of class A and one of class B in each image, far from each other.
OBJECTS = [(A, [0, 0, 20, 20]), (A, [100, 0, 20, 20]), (B, [0, 100, 20, 20])]
RIGHT = [(A, [0, 0, 20, 20], 0.9), (A, [100, 0, 20, 20], 0.5), (B, [0, 100, 20, 20], 0.5)]
# For each kind of error: what is added to the right detections, and which of these it replaces.
ERRORS = {
    'E_cls': ([(B, [100, 0, 20, 20], 0.8)], [1]),
    'E_loc': ([(A, [112, 0, 20, 20], 0.8)], [1]),  # IoU 0.25
    'E_both': ([(B, [112, 0, 20, 20], 0.8)], []),
    'E_dupe': ([(A, [1, 0, 20, 20], 0.8)], []),
    'E_bkg': ([(A, [100, 100, 20, 20], 0.8)], []),
    'E_miss': ([], [1]),
}


def annotations(images=1, crowd=False):
    boxes = [(image, *one, 0) for image in range(1, images + 1) for one in OBJECTS]
    boxes += [(1, A, [100, 100, 40, 40], 1)] * crowd
    corners = [[x, y, x + w, y, x + w, y + h, x, y + h] for _, _, (x, y, w, h), _ in boxes]
    return dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=150, height=150) for i in range(1, images + 1)],
        categories=[dict(id=A, name='a'), dict(id=B, name='<b>')],
        annotations=[
            dict(id=i, image_id=image, category_id=category, bbox=box, area=box[2] * box[3], iscrowd=crowd,
                 segmentation=[polygon])
            for i, ((image, category, box, crowd), polygon) in enumerate(zip(boxes, corners), 1)
        ],
    )  # fmt: skip


def results(detections, image=1):
    return [dict(image_id=image, category_id=c, bbox=box, score=score) for c, box, score in detections]


def with_error(kind):
    added, replaced = ERRORS[kind]
    return results([one for i, one in enumerate(RIGHT) if i not in replaced] + added)


@pytest.fixture
def truth(tmp_path):
    def write(**options):
        (tmp_path / 'truth.json').write_text(json.dumps(annotations(**options)))
        return read_annotations(tmp_path / 'truth.json')

    return write


@pytest.mark.parametrize('kind', ERRORS)
def test_each_kind_of_error(truth, kind):
    """Alone in its set, the error costs what lacks to 100 %, and the others nothing."""
    pytest.importorskip('tidecv')
    (row,) = tide_errors(truth(), {'model': with_error(kind)}).values()
    main = {name: value for name, value in row.items() if name in ERRORS}
    assert row['AP_50'] < 99 and main[kind] == pytest.approx(100 - row['AP_50'], abs=1e-6)
    assert all(value == pytest.approx(0, abs=1e-6) for name, value in main.items() if name != kind)


def test_numbers_are_those_of_tide_on_files(truth, tmp_path):
    """All errors at once and a crowd, read by TIDE's own readers; another model without errors."""
    tidecv = pytest.importorskip('tidecv')
    kinds = list(ERRORS)
    coco = truth(images=len(kinds), crowd=True)
    found = [dict(one, image_id=i) for i, kind in enumerate(kinds, 1) for one in with_error(kind)]
    perfect = [dict(one, image_id=i) for i in range(1, len(kinds) + 1) for one in results(RIGHT)]
    (tmp_path / 'found.json').write_text(json.dumps(found))
    from tidecv import datasets

    tide = tidecv.TIDE()
    run = tide.evaluate(datasets.COCO(str(tmp_path / 'truth.json')), datasets.COCOResult(str(tmp_path / 'found.json')))
    want = tide.get_all_errors()
    got = tide_errors(coco, {'perfect': perfect, 'found': found})
    assert list(got['found'].values()) == pytest.approx(
        [run.ap, *want['main']['found'].values(), *want['special']['found'].values()]
    )
    assert all(got['found'][kind] > 0.5 for kind in kinds if kind != 'E_both')
    assert got['perfect']['AP_50'] == pytest.approx(100) and sum(got['perfect'].values()) == pytest.approx(100)
    assert len(draw_errors(got).axes) + sum(len(part.axes) for part in draw_errors(got).subfigs) >= 3


def test_masks(truth):
    """Boxes that fit around masks that do not: a localisation error of masks only."""
    pytest.importorskip('tidecv')
    coco = truth()
    found = results(RIGHT)
    for one in found:
        x, y, w, h = one['bbox']
        one['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    x, y, w, h = found[0]['bbox']
    found[0]['segmentation'] = [[x, y, x + w, y, x, y + h * 0.7]]  # a third of the square
    assert tide_errors(coco, {'m': found})['m']['AP_50'] == pytest.approx(100)
    assert tide_errors(coco, {'m': found}, masks=True)['m']['E_loc'] > 5


def test_without_tidecv(truth, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'tidecv', None)
    with pytest.raises(UserError, match='needs the package tidecv; run: pip install tidecv'):
        tide_errors(truth(), {'m': results(RIGHT)})


def test_predictions_of_test_py(truth, tmp_path):
    """Labels count the categories in the order of their ids; boxes are corners."""
    instances = dict(
        labels=torch.tensor([1, 0]), scores=torch.tensor([0.5, 0.25]),
        bboxes=torch.tensor([[0.0, 100, 20, 120], [1, 2, 4, 8]]),
    )  # fmt: skip
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps([dict(img_id=1, img_path='x/1.jpg', pred_instances=instances)]))
    found, files = read_detections(tmp_path / 'p.pkl', truth())
    assert found == [
        dict(image_id=1, category_id=B, score=0.5, bbox=[0, 100, 20, 20]),
        dict(image_id=1, category_id=A, score=0.25, bbox=[1, 2, 3, 6]),
    ]
    assert files == {1: 'x/1.jpg'}
    (tmp_path / 'other.json').write_text(json.dumps(results(RIGHT, image=9)))
    for name, message in (('other.json', 'no detections of images'), ('none.pkl', 'cannot be read')):
        with pytest.raises(UserError, match=message):
            read_detections(tmp_path / name, truth())


def test_matches(truth):
    """A detection below the score finds nothing; one in a crowd is neither right nor false."""
    coco = truth(crowd=True)
    found = results([*RIGHT, (A, [105, 105, 20, 20], 0.9), (B, [60, 60, 20, 20], 0.8)])
    here = matches(evaluated(coco, found), 0.6)[1]
    assert (here.found, here.missed) == ({1}, {2, 3})
    assert (len(here.right), len(here.false)) == (1, 1)


def test_order_of_pictures(truth):
    """Image 2: one finds an object more and both have as many false ones; image 3: two false detections more."""
    coco = truth(images=3)
    same = results(RIGHT, 1)
    one = same + results(RIGHT, 2) + results(RIGHT, 3)
    other = same + results(RIGHT[1:], 2) + results([*RIGHT, (A, [60, 60, 20, 20], 0.9), (A, [60, 90, 9, 9], 0.9)], 3)
    evaluations = {'one': evaluated(coco, one), 'other': evaluated(coco, other)}
    found = {name: matches(evaluation, 0.3) for name, evaluation in evaluations.items()}
    assert by_difference(found) == [(3, 2), (2, 1), (1, 0)]
    figure = draw_side_by_side(evaluations, found, 3, np.zeros((150, 150, 3), np.uint8))
    assert [axis.get_title() for axis in figure.axes] == [
        'ground truth, 3 objects', 'one\n3 matched, 0 false, 0 missed', 'other\n3 matched, 2 false, 0 missed'
    ]  # fmt: skip


def test_precision_recall(truth):
    """The missing one of two objects ends the curve of class a at half the recall."""
    one, other = (evaluated(truth(), found) for found in (with_error('E_miss'), results(RIGHT)))
    figure = draw_precision_recall({'m': one, 'n': other})
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert list(axes)[:6] == ['all objects', 'small objects', 'medium objects', 'large objects', 'a', '<b>']
    recall, precision = axes['a'].lines[0].get_data()
    assert precision[recall < 0.495] == pytest.approx(1) and (precision[recall > 0.505] == 0).all()
    assert not axes['large objects'].lines and len(axes['all objects'].lines) == 2
