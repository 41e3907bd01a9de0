"""INT8 of exported models, by onnxruntime (tools/export_onnx.py --int8)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bnet_mm.engine.export import Exported, open_session, run_session

KINDS = ['Conv', 'Gemm', 'MatMul']  # what becomes INT8; what comes after the heads of a detector stays as it is


@torch.no_grad()
def quantise(model: Exported, path: str, shape: list[int], pictures: Sequence[np.ndarray]) -> str:
    """Make convolutions and matrix products of an ONNX file INT8: static, symmetric weights per channel.

    Args:
        model: What the file was made of.
        path: The file, which is written anew.
        shape: Height and width of its images.
        pictures: Two or more, as :meth:`Exported.read_pictures` has them: every second one is kept apart, the others
            set the ranges of the maps.

    Returns:
        What it changes on the pictures that were kept apart.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    images = [model.image(1, *shape, pictures=[picture]) for picture in pictures]

    class Images(CalibrationDataReader):
        left = iter(images[::2])

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {'image': image.numpy()}

    session = open_session(path)
    before = [run_session(session, image) for image in images[1::2]]
    quantize_static(
        path, path, Images(), per_channel=True, op_types_to_quantize=KINDS,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    session = open_session(path)
    after = [run_session(session, image) for image in images[1::2]]
    return f'INT8 on {len(before)} other pictures: {_change(model.task, before, after)}'


def _change(task: str, before: list[list[Tensor]], after: list[list[Tensor]]) -> str:
    if task == 'boxes':
        found = sum(_found_again(*pair) for pair in zip(before, after))
        right = sum(_found_again(*pair) for pair in zip(after, before))
        boxes = [sum(len(outputs[0]) for outputs in part) for part in (before, after)]
        return f'{found} of {boxes[0]} boxes are found again (IoU > 0.5, same label), {boxes[1] - right} others are new'
    square = sum((one - two).square().sum() for pair in zip(before, after) for one, two in zip(*pair))
    size = sum(value.square().sum() for outputs in before for value in outputs)
    text = f'root mean square error {100 * float(square / size) ** 0.5:.2f} % of the output'
    if task in ('BaseClassifier', 'Recognizer2D'):
        same = sum((one[0].argmax() == two[0].argmax()).item() for one, two in zip(before, after))
        text += f', the same class in {same}'
    return text


def _found_again(wanted: list[Tensor], found: list[Tensor]) -> int:
    """How many of these boxes have one of their label among the others."""
    from mmdet.structures.bbox import bbox_overlaps

    same = wanted[2][:, None] == found[2]
    return int((same & (bbox_overlaps(wanted[0], found[0]) > 0.5)).any(1).sum())
