# ../pspnet_r50_bn_40k_cityscapes.py with imported types.
from mmengine.config import read_base

with read_base():
    from ._base_.runtime import *
from mmcv.transforms import LoadImageFromFile, RandomResize, TestTimeAug
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.optim import OptimWrapper, PolyLR
from mmengine.runner import IterBasedTrainLoop, TestLoop, ValLoop
from mmengine.utils.dl_utils.parrots_wrapper import SyncBatchNorm
from torch.optim import SGD

from mmseg.datasets import CityscapesDataset
from mmseg.datasets.transforms import (
    LoadAnnotations,
    PackSegInputs,
    PhotoMetricDistortion,
    RandomCrop,
    RandomFlip,
    Resize,
)
from mmseg.engine import SegVisualizationHook
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, FCNHead, PSPHead, ResNet, SegDataPreProcessor, SegTTAModel
from mmseg.models.losses import CrossEntropyLoss
from mmseg.visualization import SegLocalVisualizer

default_scope = 'mmseg'
crop_size = (512, 1024)
norm_cfg = dict(type=SyncBatchNorm, requires_grad=True)
data_preprocessor = dict(
    type=SegDataPreProcessor,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True,
    pad_val=0,
    seg_pad_val=255,
    size=crop_size,
)
model = dict(
    type=EncoderDecoder,
    data_preprocessor=data_preprocessor,
    pretrained=None,
    backbone=dict(
        type=ResNet,
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 2, 4),
        strides=(1, 2, 1, 1),
        norm_cfg=norm_cfg,
        norm_eval=False,
        style='pytorch',
        contract_dilation=True,
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    decode_head=dict(
        type=PSPHead,
        in_channels=2048,
        in_index=3,
        channels=512,
        pool_scales=(1, 2, 3, 6),
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss, use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type=FCNHead,
        in_channels=1024,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=19,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss, use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

train_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations),
    dict(type=RandomResize, scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type=RandomCrop, crop_size=crop_size, cat_max_ratio=0.75),
    dict(type=RandomFlip, prob=0.5),
    dict(type=PhotoMetricDistortion),
    dict(type=PackSegInputs),
]
test_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=Resize, scale=(2048, 1024), keep_ratio=True),
    dict(type=LoadAnnotations),
    dict(type=PackSegInputs),
]
tta_model = dict(type=SegTTAModel)
tta_pipeline = [
    dict(type=LoadImageFromFile, backend_args=None),
    dict(
        type=TestTimeAug,
        transforms=[
            [dict(type=Resize, scale_factor=ratio, keep_ratio=True) for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)],
            [dict(type=RandomFlip, prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [dict(type=LoadAnnotations)],
            [dict(type=PackSegInputs)],
        ],
    ),
]
data_root = 'data/cityscapes/'
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type=InfiniteSampler, shuffle=True),
    dataset=dict(
        type=CityscapesDataset,
        data_root=data_root,
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = test_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CityscapesDataset,
        data_root=data_root,
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        pipeline=test_pipeline,
    ),
)
val_evaluator = test_evaluator = dict(type=IoUMetric, iou_metrics=['mIoU'])

train_cfg = dict(type=IterBasedTrainLoop, max_iters=40000, val_interval=4000)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
param_scheduler = [dict(type=PolyLR, eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
optim_wrapper = dict(
    type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01, momentum=0.9, weight_decay=0.0005), clip_grad=None
)
auto_scale_lr = dict(enable=False, base_batch_size=16)

default_hooks.update(
    logger=dict(log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=4000),
    visualization=dict(type=SegVisualizationHook),
)
env_cfg.update(cudnn_benchmark=True)
visualizer = dict(type=SegLocalVisualizer, vis_backends=vis_backends, name='visualizer')
log_processor = dict(by_epoch=False)
