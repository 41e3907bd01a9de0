"""Detectors from image to boxes in operators that torch.export and ONNX know, for tools/export_onnx.py.

What mmdet 3's one- and two-stage detectors do after the forward pass of their heads, in the same order and with the
same arithmetic: the best of each level, decoding, thresholds, suppression, RoI pooling. Their own code cannot be
exported: it branches on what is in the image, and mmcv's nms and RoIAlign are no operators of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnet_mm.layers.arguments import Duck
from bnet_mm.ops.schemas import LIBRARY

LIBRARY.define('nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor')
LIBRARY.define(
    'roi_align(Tensor x, Tensor rois, float spatial_scale, int height, int width, int sampling_ratio, bool aligned)'
    ' -> Tensor'
)
register_fake = getattr(torch.library, 'register_fake', None) or torch.library.impl_abstract  # before torch 2.4
Boxes = tuple[Tensor, Tensor, Tensor]
OUTPUTS = ('boxes', 'scores', 'labels')
# Whose methods are said here in other words: a part of the model (empty: itself), a class of mmdet, and its methods.
ONE_STAGE = (
    ('', 'SingleStageDetector', ('predict',)),
    ('bbox_head', 'AnchorHead', ('forward',)),
    ('bbox_head', 'BaseDenseHead', ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')),
)
TWO_STAGES = (
    ('', 'TwoStageDetector', ('predict',)),
    ('rpn_head', 'AnchorHead', ('forward',)),
    ('rpn_head', 'BaseDenseHead', ('predict', 'predict_by_feat')),
    ('rpn_head', 'RPNHead', ('_predict_by_feat_single', '_bbox_post_process')),
    ('roi_head', 'BaseRoIHead', ('predict',)),
    ('roi_head', 'StandardRoIHead', ('predict_bbox', '_bbox_forward')),
    ('roi_head.bbox_roi_extractor', 'SingleRoIExtractor', ('forward', 'map_roi_levels')),
    ('roi_head.bbox_head', 'BBoxHead', ('predict_by_feat', '_predict_by_feat_single')),
)


@torch.library.impl(LIBRARY, 'nms', 'CompositeExplicitAutograd')
def _(boxes, scores, iou_threshold):
    from mmcv.ops import nms

    return nms(boxes, scores, iou_threshold)[1]


@register_fake('bnet_mm::nms')
def _(boxes, scores, iou_threshold):
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


@torch.library.impl(LIBRARY, 'roi_align', 'CompositeExplicitAutograd')
def _(x, rois, spatial_scale, height, width, sampling_ratio, aligned):
    from mmcv.ops import roi_align

    return roi_align(x, rois, (height, width), spatial_scale, sampling_ratio, 'avg', aligned)


@register_fake('bnet_mm::roi_align')
def _(x, rois, spatial_scale, height, width, sampling_ratio, aligned):
    return x.new_empty(rois.shape[0], x.shape[1], height, width)


def onnx_translations() -> dict[Callable, Callable]:
    """What the operators above are in ONNX, for ``custom_translation_table`` of ``torch.onnx.export``."""
    import onnxscript

    op: Duck = onnxscript.opset18

    def nms(boxes, scores, iou_threshold: float):
        most = op.Constant(value_int=torch.iinfo(torch.int64).max)
        found = op.NonMaxSuppression(op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0, 1]), most, iou_threshold)
        return op.Gather(found, op.Constant(value_int=2), axis=1)  # of batch, class and box, the best ones first

    def roi_align(x, rois, spatial_scale: float, height: int, width: int, sampling_ratio: int, aligned: bool):
        images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)  # int64
        return op.RoiAlign(
            x, op.Slice(rois, [1], [5], [1]), images, spatial_scale=spatial_scale, output_height=height,
            output_width=width, sampling_ratio=sampling_ratio,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
        )  # fmt: skip

    return {torch.ops.bnet_mm.nms.default: nms, torch.ops.bnet_mm.roi_align.default: roi_align}


def why_not_boxes(model: nn.Module) -> str:
    """Why :func:`boxes_of` would not compute what this detector does; nothing if it does."""
    two_stages = hasattr(model, 'roi_head')
    for path, base, methods in TWO_STAGES if two_stages else ONE_STAGE:
        try:
            part = model.get_submodule(path)
        except AttributeError:
            return f'a {type(model).__name__} has no {path}'
        kind = next((cls for cls in type(part).__mro__ if cls.__name__ == base), None)
        if kind is None:
            return f'{path or "the model"} is a {type(part).__name__}, not a {base}'
        for name in methods:
            if getattr(type(part), name) is not getattr(kind, name):
                return f'{path or "the model"} is a {type(part).__name__}, which has a {name} of its own'
    detector: Duck = model
    heads = [detector.rpn_head, detector.roi_head.bbox_head] if two_stages else [detector.bbox_head]
    configs = [detector.rpn_head.test_cfg, detector.roi_head.test_cfg] if two_stages else [detector.bbox_head.test_cfg]
    if configs[0].get('nms_pre', -1) < 1:
        return 'its test_cfg has no nms_pre'
    if unknown := [str(cfg.nms) for cfg in configs if set(cfg.nms) - {'type', 'iou_threshold', 'split_thr'}
                   or cfg.nms.get('type', 'nms') != 'nms']:  # fmt: skip
        return f'its test_cfg has another suppression than plain nms: {unknown[0]}'
    if any(getattr(head.loss_cls, 'custom_cls_channels', False) for head in heads):
        return 'its classes have an activation of their own'
    if two_stages:
        head = detector.roi_head
        if head.with_mask or head.with_shared_head:
            return f'roi_head has a {"mask head" if head.with_mask else "shared head"}'
        layers = head.bbox_roi_extractor.roi_layers
        if any(type(layer).__name__ != 'RoIAlign' or layer.pool_mode != 'avg' for layer in layers):
            return f'its RoIs are pooled by {layers[0]}'
    return ''


def boxes_of(model: Duck, image: Tensor) -> Boxes:
    """The boxes in one image, the best ones first.

    Args:
        model: A detector of mmdet in evaluation mode, of which :func:`why_not_boxes` says nothing.
        image: (1, 3, H, W), after the data preprocessor.

    Returns:
        Boxes (n, 4) in pixels of ``image``, left, top, right, bottom; scores (n,); labels (n,).
    """
    maps, size = model.extract_feat(image), image.shape[2:]
    if not hasattr(model, 'roi_head'):
        head = model.bbox_head
        boxes, scores, labels, _ = _best_of_levels(head, maps, size)
        return _suppress(boxes, scores, labels, head.test_cfg, head.test_cfg.get('score_thr', 0))
    boxes, scores, _, levels = _best_of_levels(model.rpn_head, maps, size)
    proposals, _, _ = _suppress(boxes, scores, levels, model.rpn_head.test_cfg)
    return _second_stage(model.roi_head, maps, proposals, size)


def _best_of_levels(head: Duck, maps: tuple[Tensor, ...], size: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes, scores, labels and levels of the ``nms_pre`` best of each level of a dense head."""
    found = []
    outputs = head(maps)
    sizes = [scores.shape[2:] for scores in outputs[0]]
    priors = head.prior_generator.grid_priors(sizes, dtype=outputs[0][0].dtype, device=outputs[0][0].device)
    for level, (logits, deltas, places) in enumerate(zip(*outputs, priors)):
        logits = logits[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels)
        scores = logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(1)[:, :-1]
        labels, scores = scores.shape[1], scores.flatten()
        scores, best = scores.topk(torch.sym_min(head.test_cfg.nms_pre, scores.shape[0]))
        row = best // labels
        deltas = deltas[0].permute(1, 2, 0).reshape(-1, head.bbox_coder.encode_size)
        boxes = head.bbox_coder.decode(places[row], deltas[row], max_shape=size)
        found.append((boxes, scores, best % labels, torch.full_like(best, level)))
    boxes, scores, labels, levels = map(torch.cat, zip(*found))
    return boxes, scores, labels, levels


def _second_stage(stage: Duck, maps: tuple[Tensor, ...], proposals: Tensor, size: torch.Size) -> Boxes:
    extractor, head = stage.bbox_roi_extractor, stage.bbox_head
    torch._check(proposals.shape[0] > 0)  # mmdet's code then has no branch; the same code is right for none
    rois = F.pad(proposals, (1, 0))  # all of image 0
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    regions = maps[0].new_zeros(proposals.shape[0], maps[0].shape[1], *extractor.roi_layers[0].output_size)
    for level, (layer, values) in enumerate(zip(extractor.roi_layers, maps)):
        here = (levels == level).nonzero()[:, 0]
        options = layer.spatial_scale, *layer.output_size, layer.sampling_ratio, layer.aligned
        regions = regions.index_put((here,), torch.ops.bnet_mm.roi_align(values, rois[here], *options))
    logits, deltas = head(regions)
    kinds = 1 if head.reg_class_agnostic else head.num_classes
    deltas = deltas.view(-1, head.bbox_coder.encode_size)
    boxes = head.bbox_coder.decode(proposals.repeat_interleave(kinds, dim=0), deltas, max_shape=size)
    boxes = boxes.view(-1, kinds, 4).expand(-1, head.num_classes, 4).reshape(-1, 4)
    labels = torch.arange(head.num_classes, device=logits.device).repeat(proposals.shape[0])
    scores = logits.softmax(1)[:, :-1].reshape(-1)
    return _suppress(boxes, scores, labels, stage.test_cfg, stage.test_cfg.score_thr)


def _suppress(boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Duck, score_thr: float = -1.0) -> Boxes:
    """The ``max_per_img`` best that are left when each group has had its non-maximum suppression, with their groups."""
    chosen = scores > score_thr
    if cfg.get('min_bbox_size', -1) >= 0:
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        chosen = chosen & (width > cfg.min_bbox_size) & (height > cfg.min_bbox_size)
    boxes, scores, groups = (values[chosen.nonzero()[:, 0]] for values in (boxes, scores, groups))
    # Groups are moved apart as mmcv does it, so that they are rounded alike; the 0 is for no box at all.
    apart = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max() + 1
    moved = boxes + (groups.to(boxes) * apart)[:, None]
    kept = torch.ops.bnet_mm.nms(moved, scores, cfg.nms.iou_threshold)[: cfg.max_per_img]
    return boxes[kept], scores[kept], groups[kept]


def boxes_by_host(model: Duck, image: Tensor) -> Boxes:
    """The same as :func:`boxes_of` by mmdet's own code."""
    from mmdet.structures import DetDataSample

    size = tuple(image.shape[2:])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0)))
    found = model.predict(image, [sample], rescale=False)[0].pred_instances
    return found.bboxes, found.scores, found.labels


def compare_boxes(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> tuple[int, float]:
    """How many boxes of either set have no box of their label in the other one, whose coordinates (in pixels) and score
    differ by ``tolerance`` at most; and the largest difference of those that have one. The order does not count.
    """
    (boxes, scores, labels), (boxes_wanted, scores_wanted, labels_wanted) = found, wanted
    values, values_wanted = (torch.cat([b, s[:, None]], 1) for b, s in ((boxes, scores), (boxes_wanted, scores_wanted)))
    distances = (values[:, None] - values_wanted).abs().amax(2)
    distances = distances.masked_fill(labels[:, None] != labels_wanted, float('inf'))
    if not distances.numel():
        return len(boxes) + len(boxes_wanted), 0.0
    nearest = torch.cat([distances.amin(0), distances.amin(1)])
    alike = nearest <= tolerance
    return int((~alike).sum()), nearest[alike].max().item() if alike.any() else 0.0
