"""Models as ONNX files, compared in onnxruntime before they are kept (tools/export_onnx.py)."""

from __future__ import annotations

import importlib
import logging

import torch
import torch.nn.functional as F
from mmengine.utils import digit_version
from torch import Tensor, nn

from bnet_mm.cli import UserError, clear_errors

PACKAGES = ('onnx', 'onnxruntime', 'onnxscript')
TOLERANCE = 1e-3  # largest difference, relative to the largest value of the output

# What is exported of a model, by the host's base class.
TASKS = {
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


class Exported(nn.Module):
    """The part of a host's model that is exported: ``image`` to a tuple of outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        task = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in TASKS), None)
        if task is None:
            raise UserError(
                f'a {type(model).__name__} cannot be exported, only detectors, segmentors, 2D recognisers, classifiers'
            )
        self.task: str = task
        self.model, self.segments = model, getattr(getattr(model, 'backbone', None), 'num_segments', None)
        self.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        outputs = TASKS[self.task](self.model, image)
        return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)

    def axes(self, any_size: bool) -> dict[int, str]:
        """The free axes of ``image``; the segments are one too, unless the backbone (TSM) is built for a number."""
        names: tuple[str, ...] = ('batch', '', 'height', 'width')
        if self.task == 'Recognizer2D':
            names = ('batch', '' if self.segments else 'segments', '', 'height', 'width')
        return {i: name for i, name in enumerate(names) if name and (any_size or name in ('batch', 'segments'))}

    def image(self, batch: int, height: int, width: int) -> Tensor:
        """A random input; the number of segments, where it is free, varies with the batch."""
        segments = (self.segments or batch + 2,) if self.task == 'Recognizer2D' else ()
        return torch.randn(batch, *segments, 3, height, width)


def description(model: nn.Module) -> str:
    """What has to be done to images before they are the exported model's input."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    switches = ('_channel_conversion', 'channel_conversion', 'to_rgb')
    order = 'BGR turned into RGB' if any(getattr(preprocessor, n, False) for n in switches) else 'channels as loaded'
    mean, std = getattr(preprocessor, 'mean', None), getattr(preprocessor, 'std', None)
    if mean is None or std is None:
        return f'input: {order}, values as loaded (the config has no mean and std)'
    mean, std = (', '.join(f'{value:g}' for value in tensor.flatten().tolist()) for tensor in (mean, std))
    return f'input: {order}, normalised as the data preprocessor does: (x - mean) / std, mean {mean}, std {std}'


@torch.no_grad()
def export_checked(original: Exported, folded: Exported, shape: list[int], path: str) -> None:
    """Write the ONNX file, for any height and width if that can be done, and compare it in two sizes."""
    height, width = shape
    with clear_errors(f'the model does not take images of {height} x {width}'):
        original(original.image(2, height, width))
    small = original.image(1, height, width)
    # Traced at 256 x 256 at least: in smaller images some maps are one pixel wide, which is taken for a constant.
    traced = [max(256, height), max(256, width)]
    other = original.image(2, traced[0] + 32, traced[1] + 96)
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
        compare(original, path, [small, original.image(2, height, width)])


def export(model: Exported, path: str, axes: dict[int, str], shape: list[int], try_on: Tensor | None = None) -> None:
    """Trace the model and write it.

    Raises:
        ValueError, AssertionError: If the trace does not hold for ``try_on``, an input of another size; torch would
            write a file all the same, slightly wrong in other sizes.
    """
    image = model.image(2, *shape)
    names = [f'feat{i}' for i in range(len(model(image)))] if model.task == 'BaseDetector' else ['logits']
    free = {axis: torch.export.Dim.DYNAMIC for axis in axes}
    program = torch.export.export(model, (image,), dynamic_shapes=(free,), strict=False)
    if try_on is not None:
        for node in program.graph.nodes:  # ONNX has this pooling for a known size only
            if 'adaptive' in str(node.target) and any(size != 1 for size in node.args[1]):
                raise ValueError(f'it has adaptive pooling to {" x ".join(map(str, node.args[1]))}')
        program.module()(try_on)  # checks the assumptions that were made about sizes
    torch.onnx.export(
        program, (), path, input_names=['image'], output_names=names, dynamic_shapes=dict(image=axes),
        dynamo=True, external_data=False, verbose=False,
    )  # fmt: skip


def compare(original: Exported, path: str, images: list[Tensor]) -> None:
    """Check the file and compare it with torch.

    Raises:
        ValueError: If they differ.
    """
    import onnx
    import onnxruntime

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
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised anyway
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    for value in (*session.get_inputs(), *session.get_outputs()):
        print(f'{value.name}: {" x ".join(map(str, value.shape))}')
    for image in images:
        outputs = list(zip(session.run(None, {'image': image.numpy()}), original(image)))
        differences = torch.stack([(torch.from_numpy(got) - want).abs().max() for got, want in outputs])
        scales = torch.stack([want.abs().max() for _, want in outputs])
        absolute, relative = differences.max(), (differences / scales.clamp(min=1e-12)).max()
        size = ' x '.join(map(str, image.shape))
        print(f'onnxruntime and torch at {size}: largest difference {absolute:.1e}, relative {relative:.1e}')
        if not relative <= TOLERANCE:
            raise ValueError(f'onnxruntime and torch differ at {size} by {relative:.1e}, more than {TOLERANCE:.0e}')
