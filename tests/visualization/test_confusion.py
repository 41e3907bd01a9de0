"""Confusion matrices, counted by hand."""

import pytest
import torch

from bnet_mm.visualization.confusion import confusion_matrix, draw_confusion


def classifier(pairs, classes=3):
    return [dict(gt_label=torch.tensor([true]), pred_score=torch.eye(classes)[guess]) for true, guess in pairs]


def segmentor(true, guess, classes=3):
    data = {key: dict(data=torch.tensor([value])) for key, value in dict(gt_sem_seg=true, pred_sem_seg=guess).items()}
    return dict(data, seg_logits=dict(data=torch.zeros(classes, *data['gt_sem_seg']['data'].shape[1:])))


def test_images_of_a_classifier():
    matrix = confusion_matrix(classifier([(0, 0), (0, 0), (0, 2), (1, 1)]))
    assert matrix.tolist() == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_pixels_of_a_segmentor_without_those_that_are_ignored():
    samples = [segmentor([[0, 1], [255, 2]], [[0, 2], [1, 2]]), segmentor([[1, 1, 1]], [[1, 1, 0]])]
    assert confusion_matrix(samples).tolist() == [[1, 0, 0], [1, 2, 1], [0, 0, 1]]


def test_other_samples():
    with pytest.raises(KeyError):
        confusion_matrix([dict(other=1)])


@pytest.mark.parametrize('classes, texts', [(3, 9), (21, 0)])
def test_numbers_are_shares_of_the_true_class(classes, texts):
    matrix = torch.zeros(classes, classes, dtype=torch.long)
    matrix[0, :3] = torch.tensor([2, 0, 1])
    axis = draw_confusion(matrix, [f'class {i}' for i in range(classes)]).axes[0]
    assert [text.get_text() for text in axis.texts][:3] == ['67', '0', '33'][: min(3, texts)]
    assert len(axis.texts) == texts
    assert axis.get_yticklabels()[2].get_text() == 'class 2'
