"""INT8 files by tools/export_onnx.py --int8: what is integer in them, and how far they are from float."""

import re

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from bnet_mm.engine import quantisation
from engine.test_export import export, make

for package in ('onnx', 'onnxscript', 'onnxruntime', 'mmpretrain'):
    pytest.importorskip(package)


@torch.no_grad()
def test_int8_file(tmp_path, monkeypatch, capsys):
    """Weights of all convolutions are INT8, with a scale for each channel; outputs are near those of the model."""
    import onnx
    import onnxruntime
    from onnx import numpy_helper

    config, checkpoint, model = make('classifier', tmp_path)
    generator = np.random.default_rng(0)
    files = [tmp_path / f'{i}.png' for i in range(8)]
    for file in files:
        coarse = generator.integers(0, 256, (6, 7, 3)).astype(np.uint8)
        cv2.imwrite(str(file), cv2.resize(coarse, (70, 60), interpolation=cv2.INTER_CUBIC))
    options = ('--shape', 64, 64, '--fixed-size', '--int8', '--images', *files)
    code, printed, error = export(monkeypatch, capsys, config, checkpoint, tmp_path / 'out.onnx', *options)
    assert code == 0, error

    values = [numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / 'out.onnx').graph.initializer]
    kernels = [value for value in values if value.ndim == 4]
    convolutions = sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())
    assert len(kernels) == convolutions and {value.dtype for value in kernels} == {np.dtype('int8')}
    assert all(abs(value.astype(int)).reshape(len(value), -1).max(1).min() >= 126 for value in kernels)

    mean, std = (value.view(3, 1, 1) for value in (model.data_preprocessor.mean, model.data_preprocessor.std))
    session = onnxruntime.InferenceSession(str(tmp_path / 'out.onnx'), providers=['CPUExecutionProvider'])
    found, wanted = [], []
    for file in files[1::2]:  # those that did not set the ranges
        rgb = torch.from_numpy(cv2.resize(cv2.imread(str(file)), (64, 64))[..., ::-1].copy()).permute(2, 0, 1)
        image = ((rgb - mean) / std)[None]
        found.append(torch.from_numpy(session.run(None, {'image': image.numpy()})[0]))
        wanted.append(model.head(model.neck(model.backbone(image))))
    found, wanted = torch.cat(found), torch.cat(wanted)
    error = ((found - wanted).norm() / wanted.norm()).item()
    sentence = r'INT8 on 4 other pictures: root mean square error (.*) % of the output, the same class in (\d)'
    said = re.search(sentence, printed)
    assert float(said[1]) == pytest.approx(100 * error, abs=0.02) and 0 < error < 0.1
    assert int(said[2]) == (found.argmax(1) == wanted.argmax(1)).sum()


def test_change_of_boxes():
    """Found again: IoU above 0.5 and the same label."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [50, 50, 60, 60]])
    moved = boxes + torch.tensor([[1.0, 0, 1, 0], [15, 0, 15, 0], [0, 0, 0, 0]])
    scores, labels = torch.ones(3), torch.tensor([0, 0, 1])
    before, after = [boxes, scores, labels], [moved[:2], scores[:2], labels[:2]]
    text = quantisation._change('boxes', [before, before], [after, before])
    assert text == '4 of 6 boxes are found again (IoU > 0.5, same label), 1 others are new'
