"""Stock configs of the four host libraries, their BNET versions, and one random training batch for each.

The BNET version of a config is made as a user would make it: a config that inherits from the stock one and says
`model = dict(type='WithBNET', base=..., bnet=...)`.
"""

import copy
from dataclasses import dataclass, field, replace

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from torch.nn.modules.batchnorm import _BatchNorm

from helpers.hosts import import_host_models

BATCH = 2
CLASSES = 2  # labels of the random batches stay below: every stock config has as many classes


@dataclass
class Entry:
    """A stock config and what its BNET version must look like.

    Attributes:
        config: As in `_base_`.
        layers: BNET layers at `where`, counted by hand from the architecture.
        where: Argument of enhance.
        frozen: How many of them the host freezes: those of frozen_stages and those whose norm_cfg says so.
        size: Side of the square training images; a map of one pixel does not train the taps off the centre.
        sample: Shape of a recogniser's sample before its height and width.
        masks: Whether the detector is given instance masks.
        zeroed: Whether BNET starts at zero where the host's BN does not: zero_init_residual holds for BNET also in the
            blocks whose host ignores it.
        options: Changes to the stock config, as in --cfg-options, where it is too heavy for a test.
        fast: Whether it is part of the cross-section that runs by default.
    """

    config: str
    layers: int
    where: str = 'C'
    frozen: int = 0
    size: int = 64
    sample: tuple = (8, 3)
    masks: bool = True
    zeroed: bool = False
    options: dict = field(default_factory=dict)
    fast: bool = False

    @property
    def scope(self):
        return self.config.partition('::')[0]

    @property
    def bnet(self):
        return dict(k=3, where=self.where)


R50, R18 = 3 + 4 + 6 + 3, 2 + 2 + 2 + 2  # residual blocks; each has one norm at C
REGNET_400MF = 1 + 2 + 7 + 12
MOBILENET_V2 = 1 + 2 + 3 + 4 + 3 + 3 + 1
MOBILENET_V3_SMALL = 11
EFFICIENTNET_B0 = 1 + 2 + 2 + 3 + 3 + 4 + 1
HRNET_W18 = 4 + 1 * 2 * 4 + 4 * 3 * 4 + 3 * 4 * 4  # modules x branches x blocks
HRNET_W18_SMALL = 2 + 1 * 2 * 2 + 3 * 3 * 2 + 2 * 4 * 2
DARKNET53 = 1 + 2 + 8 + 8 + 4
DEPTH_50 = {'model.backbone.depth': 50}
FEW_ROIS = {'model.train_cfg.rcnn.sampler.num': 16}
FEW_PROPOSALS = {'model.rpn_head.num_proposals': 20}
UNTRAINED_TSM = {'model.backbone.pretrained2d': False}

DETECTORS = [
    Entry('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', R50, frozen=3, fast=True),
    Entry('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', R50, frozen=3),
    Entry('cascade_rcnn/cascade-mask-rcnn_x101-32x4d_fpn_1x_coco.py', R50, frozen=3, zeroed=True, options=DEPTH_50),
    Entry('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py', R50, frozen=R50, options=FEW_ROIS),  # 3 in the RoI head
    Entry('gcnet/mask-rcnn_r50-syncbn-gcb-r16-c3-c5_fpn_1x_coco.py', R50, frozen=3),
    Entry('detectors/detectors_cascade-rcnn_r50_1x_coco.py', 2 * R50, frozen=2 * 3, size=128),  # and the neck's
    Entry('res2net/faster-rcnn_res2net-101_fpn_2x_coco.py', R50, frozen=3, zeroed=True, options=DEPTH_50),
    Entry('resnest/faster-rcnn_s50_fpn_syncbn-backbone+head_ms-range-1x_coco.py', R50, frozen=3, zeroed=True),
    Entry('regnet/faster-rcnn_regnetx-400MF_fpn_ms-3x_coco.py', REGNET_400MF, frozen=1),
    Entry('hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py', HRNET_W18),
    Entry('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py', R50, frozen=3, options=FEW_PROPOSALS),
    Entry('queryinst/queryinst_r50_fpn_1x_coco.py', R50, frozen=3, options=FEW_PROPOSALS),
    Entry('retinanet/retinanet_r18_fpn_1x_coco.py', 20, 'all', frozen=1 + 4),
    Entry('fcos/fcos_r50_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco.py', R50, frozen=3),
    Entry('tood/tood_r50_fpn_1x_coco.py', R50, frozen=3),
    Entry('ld/ld_r18-gflv1-r101_fpn_1x_coco.py', R18, frozen=2),  # the teacher is no part of the student
    Entry('centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py', 20 + 3 * 2, 'all'),
    Entry(
        'cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py',
        1 + (4 * 6 + 4) + 1 + (4 * 6 + 4),  # stem, hourglass (4 levels of 3 x 2, then 4), between, hourglass
        size=128,
        options={
            'model.backbone.downsample_times': 4,
            'model.backbone.stage_channels': [16] * 5,
            'model.backbone.stage_blocks': [2, 2, 2, 2, 4],
        },
    ),
    Entry('yolo/yolov3_d53_8xb8-320-273e_coco.py', DARKNET53),
    Entry('yolox/yolox_tiny_8xb8-300e_coco.py', (1 + 3 + 3 + 1) + 4 * 1, fast=True),  # backbone and neck
    Entry('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 4 + 4, r'blocks\.\d+\.conv2\.pointwise_conv', masks=False),
    Entry('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py', MOBILENET_V2),
    Entry('yolact/yolact_r50_1xb8-55e_coco.py', R50),
    Entry('solov2/solov2-light_r18_fpn_ms-3x_coco.py', R18, frozen=2),
    Entry('detr/detr_r50_8xb2-150e_coco.py', R50, frozen=R50),
    Entry('dino/dino-4scale_r50_8xb2-12e_coco.py', R50, frozen=R50, size=128, options={'model.num_queries': 100}),
    Entry('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', R50, frozen=3),
    Entry('mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py', R50, frozen=R50),
]
SEGMENTORS = [
    Entry('pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py', R50, fast=True),
    Entry('deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py', R18),
    Entry('hrnet/fcn_hr18s_4xb2-40k_cityscapes-512x1024.py', HRNET_W18_SMALL, fast=True),
    Entry('upernet/upernet_r18_4xb2-40k_cityscapes-512x1024.py', R18),
    Entry('ocrnet/ocrnet_hr18s_4xb2-40k_cityscapes-512x1024.py', HRNET_W18_SMALL),
    Entry('point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py', R50),
    Entry('icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832.py', R18),
    Entry('bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py', R18),
    Entry('bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', 2 + 2 + 4, r'stage\d\.\d\.conv2'),
    Entry('fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py', 3 + 3 + 3),
    Entry('mobilenet_v2/mobilenet-v2-d8_pspnet_4xb2-80k_cityscapes-512x1024.py', MOBILENET_V2),
    Entry('mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024.py', MOBILENET_V3_SMALL, size=400),
    Entry('resnest/resnest_s101-d8_deeplabv3plus_4xb2-80k_cityscapes-512x1024.py', R50, zeroed=True, options=DEPTH_50),
    Entry('stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 3 * 2 * 4, r'stages\.\d+\.\d+\.layers'),
    Entry('pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', (2 + 2) + (3 + 3 + 2) + (2 + 2 + 1) + 3, size=128),
    Entry('ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py', (2 + 2) + 2 * (2 + 2 + 1), size=128),
    Entry('unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py', 5 * 2, 'encoder'),
    Entry('cgnet/cgnet_fcn_4xb4-60k_cityscapes-680x680.py', 3 + 21, r'level\d\.\d+\.bn$'),
    Entry('erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024.py', 2 * (5 + 8 + 2 + 2), 'convs_layers'),
]
RECOGNIZERS = [
    Entry('tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py', R50, sample=(3, 3), fast=True),
    Entry('tsm/tsm_imagenet-pretrained-r50_8xb16-1x1x8-50e_kinetics400-rgb.py', R50, options=UNTRAINED_TSM),
    Entry(
        'tsm/tsm_imagenet-pretrained-r50-nl-dot-product_8xb16-1x1x8-50e_kinetics400-rgb.py',
        R50,
        options=UNTRAINED_TSM,
    ),
    Entry(
        'tsm/tsm_imagenet-pretrained-mobilenetv2_8xb16-1x1x8-100e_kinetics400-rgb.py',
        MOBILENET_V2,
        options=UNTRAINED_TSM,
        fast=True,
    ),
    Entry('tanet/tanet_imagenet-pretrained-r50_8xb8-1x1x8-50e_sthv1-rgb.py', R50),
    Entry('trn/trn_imagenet-pretrained-r50_8xb16-1x1x8-50e_sthv1-rgb.py', R50),
    Entry('tpn/tpn-tsm_imagenet-pretrained-r50_8xb8-1x1x8-150e_sthv1-rgb.py', R50, options=UNTRAINED_TSM),
    Entry('c2d/c2d_r50-in1k-pre_8xb32-8x8x1-100e_kinetics400-rgb.py', R50, sample=(1, 3, 8)),
]
CLASSIFIERS = [
    Entry('resnet/resnet18_8xb16_cifar10.py', 2 * R18, 'AC'),
    Entry('resnet/resnetv1d50_8xb32_in1k.py', 3 * R50, 'ABC'),
    Entry('resnext/resnext50-32x4d_8xb32_in1k.py', R50, 'B'),
    Entry('seresnet/seresnet50_8xb32_in1k.py', R50),
    Entry('res2net/res2net50-w14-s8_8xb32_in1k.py', R50),
    Entry('resnest/resnest50_32xb64_in1k.py', R50),
    Entry('regnet/regnetx-400mf_8xb128_in1k.py', REGNET_400MF),
    Entry('hrnet/hrnet-w18_4xb32_in1k.py', HRNET_W18 + 4),  # and the neck's four blocks
    Entry('mobilenet_v2/mobilenet-v2_8xb32_in1k.py', MOBILENET_V2 - 1, 'A', fast=True),  # the first has no expansion
    Entry('mobilenet_v3/mobilenet-v3-small_8xb128_in1k.py', MOBILENET_V3_SMALL),
    Entry('efficientnet/efficientnet-b0_8xb32_in1k.py', EFFICIENTNET_B0),
    Entry('shufflenet_v1/shufflenet-v1-1x_16xb64_in1k.py', 4 + 8 + 4, 'expand'),
    Entry('shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py', 4 + 8 + 4, r'branch2\.2\.bn$'),
    Entry('vgg/vgg11bn_8xb32_in1k.py', 8, 'features', size=224),
    Entry('repvgg/repvgg-A0_8xb32_in1k.py', 1 + 2 + 4 + 14 + 1, 'branch_3x3'),
    Entry('mobileone/mobileone-s0_8xb32_in1k.py', 1 + 2 + 8 + 10 + 1, 'branch_scale'),
    Entry('densenet/densenet121_4xb256_in1k.py', 6 + 12 + 24 + 16, 'norm2$'),
    Entry('inception_v3/inception-v3_8xb32_in1k.py', 3 + 4 + 2, 'branch_pool', size=128),
    Entry('cspnet/cspdarknet50_8xb32_in1k.py', DARKNET53),
    Entry('cspnet/cspresnext50_8xb32_in1k.py', 3 + 3 + 5 + 2),
    Entry('conformer/conformer-tiny-p16_8xb128_in1k.py', 11, r'cnn_block\.bn3$'),
    Entry('van/van-tiny_8xb128_in1k.py', 3 + 3 + 5 + 2, r'blocks\d\.\d+\.norm2$'),
]
NOTHING_AT_C = {  # what there is instead
    'mmaction::recognition/slowonly/slowonly_r50_8xb16-4x16x1-256e_kinetics400-rgb.py': 'BatchNorm3d',
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py': 'patch_embed.norm',
}
ZOO = [
    replace(entry, config=f'{prefix}{entry.config}')
    for prefix, entries in {
        'mmdet::': DETECTORS,
        'mmseg::': SEGMENTORS,
        'mmaction::recognition/': RECOGNIZERS,
        'mmpretrain::': CLASSIFIERS,
    }.items()
    for entry in entries
]


def stock_config(entry, bnet=None):
    """The stock config without its pretrained weights, or the config that makes it its BNET version."""
    lines = [
        "custom_imports = dict(imports=['bnet_mm'], allow_failed_imports=False)",
        f"model = dict(type='WithBNET', base=_base_.model.type, bnet={bnet!r})",
    ]
    cfg = _inherit(entry.config, *(lines if bnet else []))
    cfg.merge_from_dict(entry.options)
    if 'teacher_config' in cfg.model:  # a path in the host's repository
        cfg.model.teacher_config = _inherit(cfg.model.teacher_config.replace('configs/', 'mmdet::'))
    _drop_pretrained(cfg)
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)  # as the Runner does
    if entry.scope in ('mmdet', 'mmseg'):  # these resize or pad a batch to the stock size
        cfg.model.data_preprocessor.batch_augments = None
    if entry.scope == 'mmseg':
        cfg.model.data_preprocessor.update(size=(entry.size, entry.size), size_divisor=None)
    return cfg


def _inherit(config, *lines):
    return Config.fromstring('\n'.join([f'_base_ = {config!r}', *lines]), '.py')


def _drop_pretrained(cfg):
    for key, value in cfg.items():
        pretrained_init = key == 'init_cfg' and isinstance(value, dict) and value.get('type') == 'Pretrained'
        if pretrained_init or key in ('pretrained', 'teacher_ckpt'):
            cfg[key] = None
        elif isinstance(value, dict):
            _drop_pretrained(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                if isinstance(item, dict):
                    _drop_pretrained(item)


def build(entry, bnet=None):
    """The model of the config, on one CPU as the Runner makes it: without synchronised norms."""
    import_host_models(entry.scope)
    cfg = stock_config(entry, bnet)
    with DefaultScope.overwrite_default_scope(entry.scope):
        return revert_sync_batchnorm(MODELS.build(cfg.model))


def batch(entry):
    """A random batch as the data loader of the library gives it."""
    if entry.scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        shape = (3, entry.size, entry.size)
        return demo_mm_inputs(
            BATCH, shape, num_items=[3, 5], num_classes=CLASSES, with_mask=entry.masks, with_semantic=True
        )
    return pseudo_collate([_sample(entry) for _ in range(BATCH)])


def _sample(entry):
    size = (entry.size, entry.size)
    leading = entry.sample if entry.scope == 'mmaction' else (3,)
    inputs = torch.randint(0, 256, (*leading, *size), dtype=torch.uint8)
    if entry.scope == 'mmseg':
        from mmseg.structures import SegDataSample

        labels = PixelData(data=torch.randint(0, CLASSES, (1, *size)))
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
        sample.gt_sem_seg = sample.gt_edge_map = labels
        return dict(inputs=inputs, data_samples=sample)
    if entry.scope == 'mmaction':
        from mmaction.structures import ActionDataSample

        return dict(inputs=inputs, data_samples=ActionDataSample().set_gt_label(1))
    from mmpretrain.structures import DataSample

    return dict(inputs=inputs, data_samples=DataSample().set_gt_label(1))


def outputs(model, entry, data, training=False):
    """What the model computes in double precision, up to where it chooses (proposals, boxes, masks)."""
    model.train(training)
    model.double()
    with torch.set_grad_enabled(training):
        data = model.data_preprocessor(copy.deepcopy(data), False)
        inputs = data['inputs'].double()
        if entry.scope in ('mmaction', 'mmpretrain'):
            found = model(inputs, data['data_samples'], mode='tensor')
        else:
            features = model.extract_feat(inputs)
            found = [features, *(head(features) for head in _heads(model, entry.scope))]
    if not training:
        model.float()
    return list(tensors(found))


def learned(model, entry, data):
    """The same in training, the gradients of its square, and what the model remembers of it: name -> tensor."""
    torch.manual_seed(0)
    found = outputs(model, entry, data, training=True)
    sum(y.square().mean() for y in found).backward()
    gradients = {f'gradient of {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    values = {**{f'output {i}': y.detach() for i, y in enumerate(found)}, **gradients, **dict(model.named_buffers())}
    model.zero_grad()
    model.float()
    return values


def _heads(model, scope):
    """What of a detector or segmentor takes the features and nothing else."""
    if scope == 'mmseg':
        return [model.decode_head] if type(model).__name__ == 'EncoderDecoder' else []
    from mmdet.models import SingleStageDetector

    if isinstance(model, SingleStageDetector) and model.with_bbox:
        return [model.bbox_head]
    return [lambda features: model.roi_head.shared_head(features[0])] if model.with_shared_head else []


def tensors(nested):
    """The tensors in lists, tuples and dicts."""
    if isinstance(nested, torch.Tensor):
        yield nested
    elif isinstance(nested, (list, tuple, dict)):
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors(item)


def randomise_norms(model):
    """Random affine and statistics of all norms, in place; milder than reference.randomise, for whole detectors."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.2, 0.8)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model
