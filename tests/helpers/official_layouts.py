"""Stand-ins for the checkpoints released with BNET in 2020, and a reference network to compare outputs with.

Everything here is written from the published key names and from the formula, with torch and the standard library
only: it shares no code with the package under test, so that a mistake there cannot hide here. The weights are
random (seeded) and scaled so that activations stay of order one through the whole network.

Facts the layouts rest on:

* ImageNet files come from a plain training script: ``model.state_dict()`` as it is, an OrderedDict that carries
  torch's ``_metadata``, and an SGD state with a momentum buffer for every parameter.
* Detection files come from mmdetection 2.6 on mmcv 1.x, which drops ``_metadata``. Frozen parameters (stem and first
  stage) have no momentum buffer. Files of the old form were renamed by a published script, which leaves
  ``state_dict`` a plain dict and puts it last; ``old_form=False`` imitates its output.
* BNET stands after the last convolution of a block: ``bnet3`` in bottlenecks. The published networks use it in
  bottlenecks only, so ``bnet2`` for depths 18 and 34 continues their naming rule; no released file is known to have it.
"""

from __future__ import annotations

import io
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5
STAGE_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
COCO_CLASSES = tuple(
    (
        'person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,'
        'parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,'
        'suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,'
        'tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,'
        'hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,'
        'cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush'
    ).split(',')
)


class Entry(NamedTuple):
    """One tensor of a state dict: its name, shape, what it is, and the scale of its random values."""

    name: str
    shape: tuple[int, ...]
    kind: str  # 'weight', 'bias', 'gamma' (parameters); 'mean', 'var', 'count' (buffers)
    scale: float = 1.0


def expansion(depth: int) -> int:
    """Output channels of a block over its base channels: 4 for bottlenecks (depth 50 and up), 1 for basic blocks."""
    return 4 if depth >= 50 else 1


# --------------------------------------------------------------------------------------------------------- layouts


def _conv(name: str, out: int, into: int, k: int, scale: float = math.sqrt(2)) -> list[Entry]:
    """A convolution without bias: weight (out, into, k, k)."""
    return [Entry(f'{name}.weight', (out, into, k, k), 'weight', scale)]


def _biased(name: str, shape: tuple[int, ...], scale: float = 1.0, bias: float = 0.1) -> list[Entry]:
    """A convolution or linear layer with bias: weight of `shape`, bias (shape[0],)."""
    return [Entry(f'{name}.weight', shape, 'weight', scale), Entry(f'{name}.bias', shape[:1], 'bias', bias)]


def _statistics(name: str, channels: int) -> list[Entry]:
    """Running mean (C,), running variance (C,) and the batch counter ()."""
    return [
        Entry(f'{name}.running_mean', (channels,), 'mean', 0.3),
        Entry(f'{name}.running_var', (channels,), 'var'),
        Entry(f'{name}.num_batches_tracked', (), 'count'),
    ]


def _affine_norm(name: str, channels: int) -> list[Entry]:
    """A BN with its scale and shift: weight, bias, running_mean, running_var (C,), num_batches_tracked ()."""
    affine = [Entry(f'{name}.weight', (channels,), 'gamma'), Entry(f'{name}.bias', (channels,), 'bias', 0.2)]
    return affine + _statistics(name, channels)


def _last_norm(block: str, position: int, channels: int, k: int, scale: float, old_form: bool) -> list[Entry]:
    """The BNET of a block: statistics without affine, taps (C, 1, k, k) and bias (C,).

    Released form `bnet3.running_mean`, `bnet3.bnconv.weight`; old form `bn3.running_mean`, `bnconv3.weight`.
    """
    norm = f'{block}.bn{position}' if old_form else f'{block}.bnet{position}'
    transform = f'{block}.bnconv{position}' if old_form else f'{norm}.bnconv'
    return _statistics(norm, channels) + _biased(transform, (channels, 1, k, k), scale, 0.2)


def _block(
    name: str, into: int, base: int, depth: int, k: int, shortcut: bool, scale: float, old_form: bool
) -> list[Entry]:
    """One residual block with `into` input and `base * expansion` output channels; `scale` is that of its branch."""
    out = base * expansion(depth)
    if expansion(depth) == 4:
        shapes = [(base, into, 1), (base, base, 3), (out, base, 1)]
    else:
        shapes = [(base, into, 3), (out, base, 3)]
    entries = []
    for i, shape in enumerate(shapes, 1):
        entries += _conv(f'{name}.conv{i}', *shape)
        if i < len(shapes):
            entries += _affine_norm(f'{name}.bn{i}', shape[0])
        else:
            entries += _last_norm(name, i, out, k, scale, old_form)
    if shortcut:
        entries += _conv(f'{name}.downsample.0', out, into, 1, 1.0) + _affine_norm(f'{name}.downsample.1', out)
    return entries


def _backbone(depth: int, k: int, width: int, old_form: bool = False) -> list[Entry]:
    """The stem (7x7, 3 -> width) and four stages of the official ResNet, in its registration order."""
    entries = _conv('conv1', width, 3, 7) + _affine_norm('bn1', width)
    into = width
    for stage, blocks in enumerate(STAGE_BLOCKS[depth]):
        base, scale = width * 2**stage, math.sqrt(0.6 / blocks)
        for i in range(blocks):
            shortcut = i == 0 and (stage > 0 or expansion(depth) != 1)
            entries += _block(f'layer{stage + 1}.{i}', into, base, depth, k, shortcut, scale, old_form)
            into = base * expansion(depth)
    return entries


def _neck_and_heads(depth: int, num_classes: int, width: int, neck: int, hidden: int) -> list[Entry]:
    """FPN, RPN head and box head of Faster R-CNN (3 anchors a position, 7x7 RoI features), in 2.6's order."""
    stages = [width * 2**i * expansion(depth) for i in range(4)]
    entries = []
    for i, channels in enumerate(stages):
        entries += _biased(f'neck.lateral_convs.{i}.conv', (neck, channels, 1, 1), 0.5)
    for i in range(4):
        entries += _biased(f'neck.fpn_convs.{i}.conv', (neck, neck, 3, 3))
    entries += _biased('rpn_head.rpn_conv', (neck, neck, 3, 3), math.sqrt(2))
    entries += _biased('rpn_head.rpn_cls', (3, neck, 1, 1)) + _biased('rpn_head.rpn_reg', (12, neck, 1, 1), 0.2)
    head = 'roi_head.bbox_head'
    entries += _biased(f'{head}.fc_cls', (num_classes + 1, hidden), 2.0)
    entries += _biased(f'{head}.fc_reg', (4 * num_classes, hidden), 0.5)
    entries += _biased(f'{head}.shared_fcs.0', (hidden, neck * 49), math.sqrt(2))
    return entries + _biased(f'{head}.shared_fcs.1', (hidden, hidden), math.sqrt(2))


# ---------------------------------------------------------------------------------------------------------- values


def _draw(entry: Entry, generator: torch.Generator) -> Tensor:
    """Random values of the entry's shape; float32, or int64 for the batch counter."""
    if entry.kind == 'count':
        return torch.randint(100_000, 500_000, entry.shape, generator=generator)
    if entry.kind in ('gamma', 'var'):
        low, high = (0.5, 1.5) if entry.kind == 'gamma' else (0.5, 2.0)
        return low + (high - low) * torch.rand(entry.shape, generator=generator)
    fan_in = math.prod(entry.shape[1:]) if entry.kind == 'weight' else 1
    return torch.randn(entry.shape, generator=generator) * (entry.scale / math.sqrt(fan_in))


def _is_parameter(entry: Entry) -> bool:
    """Whether an optimizer knows the tensor; the others are buffers."""
    return entry.kind in ('weight', 'bias', 'gamma')


def _module_versions(names: Iterable[str]) -> OrderedDict:
    """What torch keeps in `state_dict._metadata`: a version for every module, 2 for those with statistics."""
    names = dict.fromkeys(names)
    versions = OrderedDict({'': {'version': 1}})
    for name in names:
        parts = name.split('.')[:-1]
        for depth in range(1, len(parts) + 1):
            module = '.'.join(parts[:depth])
            versions[module] = {'version': 2 if f'{module}.running_mean' in names else 1}
    return versions


def _sgd_state(entries: list[Entry], frozen: tuple[str, ...], generator: torch.Generator, **group: float) -> dict:
    """An SGD `state_dict()` as torch 1.4 made it: parameters are known by their `id()`, in registration order.

    Parameters whose name starts with one of `frozen` are listed in the group but have no momentum buffer.
    """
    parameters = [entry for entry in entries if _is_parameter(entry)]
    ids = [139_900_000_000_000 + 72 * i for i in range(len(parameters))]
    state = {
        number: {'momentum_buffer': torch.randn(entry.shape, generator=generator) * 1e-3}
        for number, entry in zip(ids, parameters)
        if not (frozen and entry.name.startswith(frozen))
    }
    return {'state': state, 'param_groups': [{**group, 'params': ids}]}


# ----------------------------------------------------------------------------------------------------- checkpoints


def imagenet_checkpoint(depth: int, k: int, seed: int, width: int = 64, num_classes: int = 1000) -> dict:
    """A released ImageNet checkpoint, e.g. R50_BNET-5.pth for depth 50, k 5.

    Keys: epoch, model, state_dict, best_prec1, optimizer. `width` is the number of stem channels (64 as released);
    the classifier has shape (num_classes, 8 * width * expansion).
    """
    generator = torch.Generator().manual_seed(seed)
    entries = _backbone(depth, k, width) + _biased('fc', (num_classes, 8 * width * expansion(depth)))
    state_dict = OrderedDict((entry.name, _draw(entry, generator)) for entry in entries)
    state_dict._metadata = _module_versions(state_dict)
    return {
        'epoch': 100,
        'model': f'resnet{depth}BNET',
        'state_dict': state_dict,
        'best_prec1': 76.846,
        'optimizer': _sgd_state(
            entries, (), generator, lr=1e-4, momentum=0.9, dampening=0, weight_decay=1e-4, nesterov=False
        ),
    }


def detection_checkpoint(
    depth: int,
    k: int,
    seed: int,
    old_form: bool = False,
    num_classes: int = 80,
    width: int = 64,
    neck_channels: int = 256,
    fc_channels: int = 1024,
) -> dict:
    """A released Faster R-CNN FPN checkpoint of mmdetection 2.6, e.g. Faster_R50_BNET-5.pth.

    Keys: meta, state_dict, optimizer (old form: as mmcv saved it; otherwise as the published renaming script left it,
    state_dict last and a plain dict). Shapes: laterals (neck_channels, C_i, 1, 1), shared_fcs.0
    (fc_channels, 49 * neck_channels), fc_cls (num_classes + 1, fc_channels), fc_reg (4 * num_classes, fc_channels).
    """
    generator = torch.Generator().manual_seed(seed)
    entries = [e._replace(name=f'backbone.{e.name}') for e in _backbone(depth, k, width, old_form)]
    entries += _neck_and_heads(depth, num_classes, width, neck_channels, fc_channels)
    state_dict = OrderedDict((entry.name, _draw(entry, generator)) for entry in entries)
    frozen = ('backbone.conv1.', 'backbone.bn1.', 'backbone.layer1.')
    optimizer = _sgd_state(
        entries,
        frozen,
        generator,
        lr=2e-4,
        momentum=0.9,
        dampening=0,
        weight_decay=1e-4,
        nesterov=False,
        initial_lr=0.02,
    )
    meta = _detection_meta(depth, k, num_classes)
    if old_form:
        return {'meta': meta, 'state_dict': state_dict, 'optimizer': optimizer}
    return {'meta': meta, 'optimizer': optimizer, 'state_dict': dict(state_dict)}


def _detection_meta(depth: int, k: int, num_classes: int) -> dict:
    """The meta entry that mmdetection 2.6 and mmcv 1.x write: plain strings, numbers, tuples and dicts."""
    name = f'faster_rcnn_r{depth}_fpn_1x_coco_bnet{k}'
    classes = COCO_CLASSES if num_classes == 80 else tuple(f'class{i}' for i in range(num_classes))
    backbone = f"type='ResNet', depth={depth}, use_bnconv=True, kernel_size_bn={k}"
    return {
        'mmdet_version': '2.6.0unknown',
        'config': f"model = dict(\n    type='FasterRCNN',\n    backbone=dict({backbone}))\ntotal_epochs = 12\n",
        'CLASSES': classes,
        'epoch': 12,
        'iter': 87960,
        'env_info': 'sys.platform: linux\nCUDA available: True\nPyTorch: 1.4.0\nMMCV: 1.2.1\nMMDetection: 2.6.0',
        'seed': None,
        'exp_name': f'{name}.py',
        'hook_msgs': {'last_ckpt': f'./work_dirs/{name}/epoch_11.pth'},
        'mmcv_version': '1.2.1',
        'time': 'Fri Nov 20 12:00:00 2020',
    }


def save_legacy(checkpoint: dict, path: str | Path, location: str = 'cpu') -> None:
    """Write the checkpoint as torch 1.4 did: one pickle after the other, no zip archive.

    `location` is the device the file says its tensors were saved from. The real files were saved on a GPU, so with
    'cuda:0' reading them without `map_location` fails on a machine that has none, as the real ones do.
    """
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, _use_new_zipfile_serialization=False)
    data = buffer.getvalue()
    if location != 'cpu':  # the pickle holds the string once, all tensors refer to it
        data = data.replace(_pickled(b'cpu'), _pickled(location.encode()), 1)
    Path(path).write_bytes(data)


def _pickled(text: bytes) -> bytes:
    """A string as pickle protocol 2 writes it."""
    return b'X' + len(text).to_bytes(4, 'little') + text


# ------------------------------------------------------------------------------------------------------- reference


class _Net:
    """Reads one network's tensors, in the dtype and on the device of the input, and applies its layers by name."""

    def __init__(self, state_dict: Mapping[str, Tensor], prefix: str, like: Tensor, old_form: bool) -> None:
        self.state_dict, self.prefix, self.like, self.old_form = state_dict, prefix, like, old_form

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.state_dict

    def get(self, name: str) -> Tensor:
        return self.state_dict[self.prefix + name].to(self.like)

    def per_channel(self, name: str) -> Tensor:
        """(C,) -> (1, C, 1, 1)."""
        return self.get(name)[None, :, None, None]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        """Full convolution (N, C, H, W) -> (N, C', H', W'), padded by k // 2."""
        weight = self.get(f'{name}.weight')
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def normalise(self, name: str, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps), per channel."""
        spread = (self.per_channel(f'{name}.running_var') + EPS).sqrt()
        return (x - self.per_channel(f'{name}.running_mean')) / spread

    def affine_norm(self, name: str, x: Tensor) -> Tensor:
        """gamma * normalised + beta."""
        return self.per_channel(f'{name}.weight') * self.normalise(name, x) + self.per_channel(f'{name}.bias')

    def bnet(self, block: str, position: int, x: Tensor) -> Tensor:
        """The paper's layer: the normalised map, each pixel replaced by the weighted sum of its neighbours, + bias."""
        norm = f'{block}.bn{position}' if self.old_form else f'{block}.bnet{position}'
        transform = f'{block}.bnconv{position}' if self.old_form else f'{norm}.bnconv'
        taps = self.get(f'{transform}.weight')
        return shifted_sum(self.normalise(norm, x), taps) + self.per_channel(f'{transform}.bias')

    def bottleneck(self, name: str, x: Tensor, stride: int) -> Tensor:
        """The residual branch of a bottleneck block; the 3x3 convolution takes the stride."""
        out = self.affine_norm(f'{name}.bn1', self.conv(f'{name}.conv1', x)).clamp(min=0)
        out = self.affine_norm(f'{name}.bn2', self.conv(f'{name}.conv2', out, stride)).clamp(min=0)
        return self.bnet(name, 3, self.conv(f'{name}.conv3', out))

    def basic(self, name: str, x: Tensor, stride: int) -> Tensor:
        """The residual branch of a basic block; the first convolution takes the stride."""
        out = self.affine_norm(f'{name}.bn1', self.conv(f'{name}.conv1', x, stride)).clamp(min=0)
        return self.bnet(name, 2, self.conv(f'{name}.conv2', out))

    def shortcut(self, name: str, x: Tensor, stride: int) -> Tensor:
        """The input itself, or its 1x1 convolution and BN where the block changes the shape."""
        if f'{name}.downsample.0.weight' not in self:
            return x
        return self.affine_norm(f'{name}.downsample.1', self.conv(f'{name}.downsample.0', x, stride))


def shifted_sum(x: Tensor, taps: Tensor) -> Tensor:
    """Depthwise correlation with zeros around the map, as an explicit sum: (N, C, H, W), (C, 1, k, k) -> (N, C, H, W).

    out[n, c, i, j] = sum over p, q of taps[c, 0, p, q] * x[n, c, i + p - k // 2, j + q - k // 2].
    """
    height, width = x.shape[2:]
    k = taps.shape[-1]
    padded = x.new_zeros(*x.shape[:2], height + k - 1, width + k - 1)
    padded[:, :, k // 2 : k // 2 + height, k // 2 : k // 2 + width] = x
    out = torch.zeros_like(x)
    for p in range(k):
        for q in range(k):
            out = out + taps[:, 0, p, q][None, :, None, None] * padded[:, :, p : p + height, q : q + width]
    return out


@torch.no_grad()
def reference_backbone(
    state_dict: Mapping[str, Tensor], x: Tensor, depth: int, prefix: str = '', old_form: bool = False
) -> list[Tensor]:
    """C2..C5 of the official network in evaluation mode, from an official state dict.

    `x` (N, 3, H, W), float32 or float64, decides the precision of everything. Stage i has shape
    (N, width * 2**i * expansion, H / 2**(i + 2), W / 2**(i + 2)), rounded up.
    """
    net = _Net(state_dict, prefix, x, old_form)
    branch = net.bottleneck if expansion(depth) == 4 else net.basic
    x = net.affine_norm('bn1', net.conv('conv1', x, 2)).clamp(min=0)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    outputs = []
    for stage, blocks in enumerate(STAGE_BLOCKS[depth]):
        for i in range(blocks):
            name, stride = f'layer{stage + 1}.{i}', 2 if i == 0 and stage > 0 else 1
            x = (branch(name, x, stride) + net.shortcut(name, x, stride)).clamp(min=0)
        outputs.append(x)
    return outputs
