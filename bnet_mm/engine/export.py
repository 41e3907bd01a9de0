"""Models as ONNX files, compared in onnxruntime before they are kept (tools/export_onnx.py)."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from torch import Tensor, nn

from bnet_mm.cli import UserError, clear_errors
from bnet_mm.engine import detection
from bnet_mm.layers.arguments import Duck

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
TOLERANCE = 1e-3  # largest difference, relative to the largest value of the output
BOX_TOLERANCE = 1e-2  # of boxes, in pixels
# Share of boxes that may have no counterpart: of boxes with equal scores, which wins is left to each runtime's sorting,
# and rounding can decide whether two overlap too much.
STRAY_BOXES = 0.05

# What is exported of a model, by the host's base class; boxes: of a detector as a whole.
TASKS = {
    'boxes': detection.boxes_of,
    'BaseDetector': lambda model, image: model.extract_feat(image),
    'BaseSegmentor': lambda model, image: F.interpolate(
        model(image), image.shape[2:], mode='bilinear', align_corners=model.align_corners
    ),
    'Recognizer2D': lambda model, image: model(image, stage='head'),
    'BaseClassifier': lambda model, image: model(image),
}


def check_packages() -> None:
    if digit_version(torch.__version__) < digit_version('2.6'):
        raise UserError(f'exporting needs torch 2.6 or later, this is {torch.__version__}')
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise UserError(f'{" and ".join(missing)} cannot be imported; run: pip install {" ".join(PACKAGES)}')
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # it warns of every operator of torchvision


class Preparation(NamedTuple):
    """What has to be done to an image, as its host loads it, before it is the exported model's input."""

    reverses: bool  # the order of the channels
    mean: Tensor | None
    std: Tensor | None

    @classmethod
    def of(cls, model: nn.Module) -> Preparation:
        preprocessor = getattr(model, 'data_preprocessor', None)
        switches = ('_channel_conversion', 'channel_conversion', 'to_rgb')
        mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
        known = mean is not None and std is not None
        return cls(any(getattr(preprocessor, n, False) for n in switches), *((mean, std) if known else (None, None)))

    def __str__(self) -> str:
        order = 'BGR turned into RGB' if self.reverses else 'channels as loaded'
        if self.mean is None or self.std is None:
            return f'input: {order}, values as loaded (the config has no mean and std)'
        mean, std = (', '.join(f'{value:g}' for value in part.flatten().tolist()) for part in (self.mean, self.std))
        return f'input: {order}, normalised as the data preprocessor does: (x - mean) / std, mean {mean}, std {std}'

    def __call__(self, picture: np.ndarray) -> Tensor:
        """(H, W, 3) to (3, H, W)."""
        x = torch.from_numpy(np.ascontiguousarray(picture[..., ::-1] if self.reverses else picture)).float()
        if self.mean is not None and self.std is not None:
            x = (x - self.mean.flatten()) / self.std.flatten()
        return x.permute(2, 0, 1)


class Exported(nn.Module):
    """What is exported of a host's model: ``image`` to a tuple of outputs.

    Args:
        model: A detector, segmentor, 2D recogniser or classifier.
        features: Of a detector, backbone and neck only.

    Raises:
        UserError: For any other model.
    """

    def __init__(self, model: nn.Module, features: bool = False) -> None:
        super().__init__()
        task = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in TASKS), None)
        if task is None:
            raise UserError(
                f'a {type(model).__name__} cannot be exported, only detectors, segmentors, 2D recognisers, classifiers'
            )
        self.why_not_boxes = ''  # of a detector
        if task == 'BaseDetector':
            self.why_not_boxes = '--features' if features else detection.why_not_boxes(model)
            task = task if self.why_not_boxes else 'boxes'
        self.task: str = task
        self.model, self.segments = model, getattr(getattr(model, 'backbone', None), 'num_segments', None)
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = TASKS[self.task](self.model, image)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def by_host(self, image: Tensor) -> tuple[Tensor, ...]:
        """The same outputs from the host's own code."""
        return detection.boxes_by_host(self.model, image) if self.task == 'boxes' else self(image)

    def names(self, outputs: Sequence[Tensor]) -> list[str]:
        """Those of the outputs."""
        if self.task == 'boxes':
            return list(detection.OUTPUTS)
        return [f'feat{i}' for i in range(len(outputs))] if self.task == 'BaseDetector' else ['logits']

    def axes(self, any_size: bool) -> dict[int, str]:
        """The free axes of ``image``; the segments are one too, unless the backbone (TSM) is built for a number."""
        names: tuple[str, ...] = ('' if self.task == 'boxes' else 'batch', '', 'height', 'width')
        if self.task == 'Recognizer2D':
            names = ('batch', '' if self.segments else 'segments', '', 'height', 'width')
        return {i: name for i, name in enumerate(names) if name and (any_size or name in ('batch', 'segments'))}

    def image(self, batch: int, height: int, width: int, *, pictures: Sequence[np.ndarray] = ()) -> Tensor:
        """An input of this size: these pictures in turn (H, W, 3), as :func:`read_pictures` has them, or noise.

        The number of segments, where it is free, varies with the batch. A detector as a whole has batches of one.
        """
        shape = [1 if self.task == 'boxes' else batch]
        shape += [self.segments or batch + 2] if self.task == 'Recognizer2D' else []
        if not pictures:
            return torch.randn(*shape, 3, height, width)
        import mmcv

        chosen = [pictures[i % len(pictures)] for i in range(math.prod(shape))]
        prepare = Preparation.of(self.model)
        images = torch.stack([prepare(mmcv.imresize(picture, (width, height))) for picture in chosen])
        return images.view(*shape, 3, height, width)

    def read_pictures(self, paths: Sequence[str]) -> list[np.ndarray]:
        """Image files as the host loads them: BGR, for recognisers RGB.

        Raises:
            UserError: For a file that is none.
        """
        import mmcv

        order, pictures = 'rgb' if self.task == 'Recognizer2D' else 'bgr', []
        for path in paths:
            picture = mmcv.imread(path, channel_order=order) if Path(path).is_file() else None
            if picture is None:
                raise UserError(f'--images: {path} is not a readable image')
            pictures.append(picture)
        return pictures


@torch.no_grad()
def export_checked(
    original: Exported,
    folded: Exported,
    shape: list[int],
    path: str,
    fixed_size: bool = False,
    pictures: Sequence[np.ndarray] = (),
) -> None:
    """Write the ONNX file and compare it in two sizes.

    Args:
        original: What it is compared with.
        folded: What is exported.
        shape: Height and width.
        fixed_size: Of these only; else of any height and width, if that can be done.
        pictures: To compare on; none for noise.
    """
    height, width = shape
    small = original.image(1, height, width, pictures=pictures)
    with clear_errors(f'the model does not take images of {height} x {width}'):
        original(original.image(2, height, width, pictures=pictures))
    if not fixed_size:
        # Traced at 256 x 256 at least: in smaller images some maps are one pixel wide, which is taken for a constant.
        traced = [max(256, height), max(256, width)]
        other = original.image(2, traced[0] + 32, traced[1] + 96, pictures=pictures)
        try:
            export(folded, path, original.axes(any_size=True), traced, try_on=other)
            compare(original, path, [small, other])
            return
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f'not possible for any height and width: {reason}')
    print(f'HEIGHT AND WIDTH ARE FIXED to {height} x {width}; the second comparison is another batch of that size')
    with clear_errors('the model cannot be exported'):
        export(folded, path, original.axes(any_size=False), shape)
        compare(original, path, [small, original.image(2, height, width, pictures=pictures[::-1])])


def export(model: Exported, path: str, axes: dict[int, str], shape: list[int], try_on: Tensor | None = None) -> None:
    """Trace the model and write it.

    Raises:
        ValueError, AssertionError: If the trace does not hold for ``try_on``, an input of another size; torch would
            write a file all the same, slightly wrong in other sizes.
    """
    image = model.image(2, *shape)
    names = model.names(model(image))
    free = {axis: torch.export.Dim.DYNAMIC for axis in axes}
    program = torch.export.export(model, (image,), dynamic_shapes=(free,), strict=False)
    if try_on is not None:
        for node in program.graph.nodes:  # ONNX has this pooling for a known size only
            if 'adaptive' in str(node.target) and any(size != 1 for size in node.args[1]):
                raise ValueError(f'it has adaptive pooling to {" x ".join(map(str, node.args[1]))}')
        program.module()(try_on)  # checks the assumptions that were made about sizes
    torch.onnx.export(
        program, (), path, input_names=['image'], output_names=names, dynamic_shapes=dict(image=axes),
        dynamo=True, external_data=False, verbose=False, custom_translation_table=detection.onnx_translations(),
    )  # fmt: skip


def open_session(path: str) -> Duck:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def run_session(session: Duck, image: Tensor) -> list[Tensor]:
    return [torch.from_numpy(value) for value in session.run(None, {'image': image.numpy()})]


def compare(original: Exported, path: str, images: list[Tensor]) -> None:
    """Check the file and compare it with torch.

    Raises:
        ValueError: If they differ.
    """
    import onnx

    onnx.checker.check_model(path)
    graph = onnx.load(path).graph
    channels = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    groups = [
        (attribute.i, channels[node.input[1]])
        for node in graph.node
        if node.op_type == 'Conv'
        for attribute in node.attribute
        if attribute.name == 'group'
    ]
    print(f'{len(groups)} Conv nodes, {sum(1 < group == channel for group, channel in groups)} of them depthwise')
    session = open_session(path)
    for value in (*session.get_inputs(), *session.get_outputs()):
        print(f'{value.name}: {" x ".join(map(str, value.shape))}')
    for image in images:
        got, want = run_session(session, image), original.by_host(image)
        if original.task == 'boxes':
            strays, difference = detection.compare_boxes(got, want, BOX_TOLERANCE)
            fits = strays <= STRAY_BOXES * (len(got[0]) + len(want[0]))
            text = f'{len(got[0])} and {len(want[0])} boxes, {strays} without a counterpart, '
            text += f'largest difference of the others {difference:.1e}'
        else:
            differences = torch.stack([(one - two).abs().max() for one, two in zip(got, want)])
            scales = torch.stack([two.abs().max() for two in want])
            relative = (differences / scales.clamp(min=1e-12)).max().item()
            fits = relative <= TOLERANCE
            text = f'largest difference {differences.max():.1e}, relative {relative:.1e}'
        size = ' x '.join(map(str, image.shape))
        print(f'onnxruntime and torch at {size}: {text}')
        if not fits:
            raise ValueError(f'onnxruntime and torch differ at {size}: {text}')
