"""Detectors as a whole: engine/detection.py computes what mmdet's own code does, in torch and in an ONNX file."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from torch.nn import init

from bnet_mm.engine import detection
from bnet_mm.engine.export import Exported
from helpers import reference
from helpers.hosts import import_host_models
from helpers.paths import SHARED_DATA
from helpers.tools import call_tool

pytest.importorskip('mmdet')
BACKBONE = "backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3), depth=18, base_channels=8, stem_channels=8)"
NECK = 'neck=dict(in_channels=[8, 16, 32, 64], out_channels=16)'
RPN = 'rpn_head=dict(in_channels=16, feat_channels=16)'
ROI = 'bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=7)'
ONE_STAGE = f'model = dict({BACKBONE}, {NECK}, bbox_head=dict(in_channels=16, feat_channels=16, num_classes=7))'
CONFIGS = {
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco.py', ONE_STAGE),
    'faster_rcnn': (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', f'model = dict({BACKBONE}, {NECK}, {RPN}, roi_head=dict({ROI}))',
    ),
}  # fmt: skip


def build(name, folder, more=''):
    """A small detector that finds boxes of several classes: random weights, scores spread over (0, 1)."""
    import_host_models('mmdet')
    base, text = CONFIGS[name]
    path = folder / f'{name}.py'
    path.write_text(f"_base_ = 'mmdet::{base}'\ncustom_imports = dict(imports=['bnet_mm'])\n{text}\n{more}\n")
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(Config.fromfile(path).model)
    reference.randomise(model.backbone)
    heads = [model.bbox_head] if name == 'retinanet' else [model.rpn_head, model.roi_head]
    for name, module in ((name, module) for part in (model.neck, *heads) for name, module in part.named_modules()):
        if getattr(module, 'weight', None) is not None:
            # Boxes near their anchors and scores that are not all 0 or 1, as of a trained detector: far boxes multiply
            # the rounding of the maps, and among equal scores each runtime chooses in its own order.
            scale = 0.2 if name.endswith(('_reg', '_cls')) else 1.0
            init.normal_(module.weight, std=scale / module.weight[0].numel() ** 0.5)
            init.normal_(module.bias, std=0.1 * scale)
    return model.eval()


def photographs(model, size):
    """Inputs of this size: real images where these are at hand, else noise."""
    files = sorted((SHARED_DATA / 'mini_coco' / 'val2017').glob('*.jpg'))[:3]
    exported = Exported(model)
    if not files:
        return [exported.image(1, *size) for _ in range(3)]
    return [exported.image(1, *size, pictures=[picture]) for picture in exported.read_pictures(files)]


def assert_same_boxes(found, wanted):
    """All, to 1e-3 pixels; boxes whose scores differ by a rounding may have changed places."""
    found = [torch.as_tensor(value) for value in found]
    assert len(wanted[0]) >= 5 and found[1].equal(found[1].sort(descending=True)[0])
    assert detection.compare_boxes(found, wanted, 1e-3)[0] == 0


VARIANTS = [
    ('retinanet', ''),
    ('retinanet', 'model.update(test_cfg=dict(nms_pre=50, min_bbox_size=9, score_thr=0.3, max_per_img=20))'),
    ('faster_rcnn', ''),
    ('faster_rcnn', "model['roi_head']['bbox_head'].update(reg_class_agnostic=True)"),
    ('faster_rcnn', 'model.update(test_cfg=dict(rpn=dict(nms_pre=60, max_per_img=30), rcnn=dict(score_thr=0.2)))'),
]


@pytest.mark.parametrize('size', [(256, 320), (200, 136)])
@pytest.mark.parametrize('name, more', VARIANTS)
@torch.no_grad()
def test_boxes_are_those_of_mmdet(name, more, size, tmp_path):
    model = build(name, tmp_path, more)
    assert detection.why_not_boxes(model) == ''
    for image in photographs(model, size):
        assert_same_boxes(detection.boxes_of(model, image), detection.boxes_by_host(model, image))


@pytest.mark.parametrize('name', CONFIGS)
@torch.no_grad()
def test_no_box_at_all(name, tmp_path):
    nothing = dict(retinanet='test_cfg=dict(score_thr=1.0)', faster_rcnn='test_cfg=dict(rcnn=dict(score_thr=1.0))')
    model = build(name, tmp_path, f'model.update({nothing[name]})')
    found = detection.boxes_of(model, torch.randn(1, 3, 64, 96))
    assert [value.shape for value in found] == [(0, 4), (0,), (0,)]
    assert [value.shape for value in detection.boxes_by_host(model, torch.randn(1, 3, 64, 96))] == [(0, 4), (0,), (0,)]


@pytest.mark.parametrize('base, change, reason', [
    ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', {}, 'roi_head has a mask head'),
    ('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', {}, 'roi_head is a CascadeRoIHead, not a StandardRoIHead'),
    ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', {}, 'bbox_head is a FCOSHead, not a AnchorHead'),
    ('atss/atss_r50_fpn_1x_coco.py', {}, 'bbox_head is a ATSSHead, which has a forward of its own'),
    ('gfl/gfl_r50_fpn_1x_coco.py', {}, 'bbox_head is a GFLHead, which has a forward of its own'),
    ('retinanet/retinanet_r50_fpn_1x_coco.py', {'test_cfg.nms_pre': -1}, 'its test_cfg has no nms_pre'),
    (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {'test_cfg.rcnn.nms.type': 'soft_nms'},
        'its test_cfg has another suppression than plain nms: ',
    ),
    (
        'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {'roi_head.bbox_roi_extractor.roi_layer.pool_mode': 'max'},
        'its RoIs are pooled by RoIAlign',
    ),
    ('detr/detr_r50_8xb2-150e_coco.py', {}, 'the model is a DETR, not a SingleStageDetector'),
])  # fmt: skip
def test_other_detectors_are_named(base, change, reason, tmp_path):
    import_host_models('mmdet')
    cfg = get_config(f'mmdet::{base}')
    small = {'backbone.base_channels': 8, 'backbone.stem_channels': 8, 'backbone.init_cfg': None}
    cfg.merge_from_dict({f'model.{key}': value for key, value in (small | change).items()})
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    assert detection.why_not_boxes(model).startswith(reason)
    assert Exported(model).task == 'BaseDetector'


def test_compare_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30], [1, 1, 9, 9]])
    scores, labels = torch.tensor([0.9, 0.5, 0.4]), torch.tensor([1, 1, 2])
    wanted, order = (boxes, scores, labels), torch.tensor([2, 0, 1])

    def compare(*found):
        assert detection.compare_boxes(found, wanted, 0.3) == detection.compare_boxes(wanted, found, 0.3)
        return detection.compare_boxes(found, wanted, 0.3)

    assert compare(*(value[order] for value in wanted)) == (0, 0)
    assert compare(boxes + torch.tensor([[0.0], [0.25], [0]]), scores, labels) == (0, 0.25)
    assert compare(boxes + torch.tensor([[0.0], [0.5], [0]]), scores, labels) == (2, 0)
    assert compare(boxes, scores - 0.125, labels) == (0, 0.125)
    assert compare(boxes, scores + torch.tensor([0, 0.5, 0]), labels) == (2, 0)
    assert compare(boxes[:2], scores[:2], labels[:2]) == (1, 0)
    assert compare(boxes, scores, torch.tensor([1, 1, 3])) == (2, 0)
    assert compare(*(value[:0] for value in wanted)) == (3, 0)


def onnxruntime_of(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return lambda image: session.run(None, {'image': image.numpy()})


def openvino_of(path):
    openvino = pytest.importorskip('openvino', reason='OpenVINO is not installed (pip install openvino)')
    model = openvino.compile_model(str(path), 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    return lambda image: list(model([image.numpy()]).values())


# The others take a minute each; tests/tools/test_tutorial.py exports a whole Faster R-CNN by default.
OTHERS = [('retinanet', False), ('faster_rcnn', False), ('faster_rcnn', True)]
FILES = [('retinanet', True), *(pytest.param(file, marks=pytest.mark.zoo) for file in OTHERS)]


@pytest.fixture(scope='module', params=FILES, ids=lambda file: f'{file[0]}-{"fixed" if file[1] else "free"}')
def exported(request, tmp_path_factory):
    """A model and its file by tools/export_onnx.py, of any size or of 192 x 256."""
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    name, fixed = request.param
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    model = build(name, folder)
    torch.save(model.state_dict(), folder / 'it.pth')
    arguments = [folder / f'{name}.py', folder / 'it.pth', folder / 'it.onnx', '--shape', 192, 256]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert call_tool('export_onnx', *arguments, *(['--fixed-size'] if fixed else [])) is None
    sizes = ['192 x 256'] * 2 if fixed else ['192 x 256', '288 x 352']
    found = re.findall(r'torch at 1 x 3 x (.*): (\d+) and (\d+) boxes, (\d+) without', printed.getvalue())
    assert [size for size, *_ in found] == sizes
    assert all(int(one) == int(two) >= 5 and int(strays) == 0 for _, one, two, strays in found)
    assert ('FIXED' in printed.getvalue()) == fixed
    return model, folder / 'it.onnx', fixed


@pytest.mark.parametrize('runtime', [onnxruntime_of, openvino_of])
@torch.no_grad()
def test_file_has_the_boxes_of_mmdet(exported, runtime):
    """Of the model before folding, to 1e-3 pixels, on images of the size of the file and of others if it is free."""
    import onnx

    model, path, fixed = exported
    run = runtime(path)
    for size in [(192, 256)] if fixed else [(192, 256), (320, 224), (256, 416)]:
        for image in photographs(model, size):
            assert_same_boxes(run(image), detection.boxes_by_host(model, image))
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count('NonMaxSuppression') == kinds.count('RoiAlign') // 4 + 1
    assert ('RoiAlign' in kinds) == hasattr(model, 'roi_head')
    sizes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert sizes == ([1, 3, 192, 256] if fixed else [1, 3, 'height', 'width'])
    assert [output.name for output in graph.output] == ['boxes', 'scores', 'labels']


@pytest.mark.parametrize('runtime', [onnxruntime_of, openvino_of])
def test_file_without_a_box(exported, runtime, tmp_path):
    """With thresholds that nothing exceeds there is no proposal and no box, which is no error."""
    import onnx
    from onnx import numpy_helper

    model, path, _ = exported
    proto = onnx.load(path)
    thresholds = {node.input[1] for node in proto.graph.node if node.op_type == 'Greater'}
    raised = [tensor for tensor in proto.graph.initializer if tensor.name in thresholds]
    for tensor in raised:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(1e9), tensor.name))
    assert len(raised) == len(thresholds) >= 1
    onnx.save(proto, tmp_path / 'nothing.onnx')
    found = runtime(tmp_path / 'nothing.onnx')(torch.randn(1, 3, 192, 256))
    assert [value.shape for value in found] == [(0, 4), (0,), (0,)]
