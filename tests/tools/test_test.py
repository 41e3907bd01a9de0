"""tools/test.py as a user runs it."""

import pickle

import pytest
import torch

from bnet_mm.visualization.confusion import confusion_matrix
from helpers.tools import assert_one_clear_sentence, evaluate, metrics, other_architecture, run, scalars


def test_test_evaluates_dumps_and_draws(shapes, trained, tmp_path):
    done = evaluate(
        shapes, trained / 'epoch_1.pth', tmp_path / 'test', '--out', tmp_path / 'out.pkl', '--show-dir', 'vis'
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got, want = metrics(tmp_path / 'test'), scalars(trained)[-1]
    assert got['coco/bbox_mAP_50'] == pytest.approx(want['coco/bbox_mAP_50'], abs=1e-3)
    predictions = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert len(predictions) == 6 and all(len(one['pred_instances']['scores']) > 0 for one in predictions)
    assert len(list((tmp_path / 'test').rglob('vis/*.jpg'))) == 6


def test_test_time_augmentation(shapes, trained, tmp_path):
    done = evaluate(shapes, trained / 'epoch_1.pth', tmp_path / 'test', '--tta')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'coco/bbox_mAP_50' in metrics(tmp_path / 'test')


def without_a_norm(trained, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    for name in [name for name in checkpoint['state_dict'] if name.startswith('backbone.layer2.0.bn2')]:
        del checkpoint['state_dict'][name]
    torch.save(checkpoint, tmp_path / 'less.pth')
    return tmp_path / 'less.pth'


def truncated(trained, tmp_path):
    (tmp_path / 'cut.pth').write_bytes((trained / 'epoch_1.pth').read_bytes()[:5000])
    return tmp_path / 'cut.pth'


def no_checkpoint(trained, tmp_path):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    return tmp_path / 'text.pth'


def test_leftover_keys_are_reported_and_do_not_stop_a_test(shapes, trained, tmp_path):
    checkpoint = torch.load(trained / 'epoch_1.pth', weights_only=False)
    checkpoint['state_dict']['data_preprocessor.mean'] = torch.zeros(3, 1, 1)
    torch.save(checkpoint, tmp_path / 'more.pth')
    done = evaluate(shapes, tmp_path / 'more.pth', tmp_path / 'w')
    assert done.returncode == 0 and 'unexpected key in source state_dict: data_preprocessor.mean' in done.stdout


def no_tensors(trained, tmp_path):
    torch.save(dict(model=dict(weight=torch.zeros(3)), epoch=3), tmp_path / 'odd.pth')
    return tmp_path / 'odd.pth'


@pytest.mark.parametrize('make, message', [
    (no_tensors, 'odd.pth is not a checkpoint of this model'),
    (lambda trained, tmp_path: tmp_path / 'none.pth', 'none.pth does not exist'),
    (truncated, 'cut.pth is not a readable checkpoint'),
    (no_checkpoint, 'text.pth is not a readable checkpoint'),
    (other_architecture, 'other.pth is not a checkpoint of this model'),
    (without_a_norm, 'not the BNET layer after it, backbone.layer2.0.bn2'),
])  # fmt: skip
def test_bad_checkpoint(shapes, trained, tmp_path, make, message):
    checkpoint = make(trained, tmp_path)
    assert_one_clear_sentence(evaluate(shapes, checkpoint, tmp_path / 'w'), message)


def test_one_entry_serves_mmseg_configs_too(segmentation, tmp_path):
    """A PSPNet with BNET, trained and evaluated by the same two tools."""
    config = segmentation('BN')
    done = run('tools/train.py', config, '--work-dir', tmp_path / 'w')
    assert done.returncode == 0, done.stderr[-3000:]
    test = ['tools/test.py', config, tmp_path / 'w' / 'iter_2.pth', '--work-dir', tmp_path / 't']
    done = run(*test, '--show-dir', 'vis', '--out', tmp_path / 'out.pkl')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'mIoU' in metrics(tmp_path / 't')
    matrix = confusion_matrix(pickle.loads((tmp_path / 'out.pkl').read_bytes()))
    assert matrix.shape == (2, 2) and matrix.sum() == 4 * 32 * 32
    found = matrix.diagonal().double()
    iou = found / (matrix.sum(0) + matrix.sum(1) - found)
    assert abs(100 * iou.mean() - metrics(tmp_path / 't')['mIoU']) < 0.01
    assert len(list((tmp_path / 't' / 'vis').rglob('*.png'))) == 4
