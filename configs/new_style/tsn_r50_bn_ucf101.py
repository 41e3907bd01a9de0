# ../tsn_r50_bn_ucf101.py with imported types.
from mmengine.config import read_base

with read_base():
    from ._base_.runtime import *
from mmengine.dataset import DefaultSampler
from mmengine.hooks import RuntimeInfoHook, SyncBuffersHook
from mmengine.optim import MultiStepLR
from mmengine.runner import EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from torch.optim import SGD

from mmaction.datasets import VideoDataset
from mmaction.datasets.transforms import (
    CenterCrop,
    Flip,
    FormatShape,
    MultiScaleCrop,
    OpenCVDecode,
    OpenCVInit,
    PackActionInputs,
    Resize,
    SampleFrames,
    TenCrop,
)
from mmaction.evaluation import AccMetric
from mmaction.models import ActionDataPreprocessor, Recognizer2D, ResNet, TSNHead
from mmaction.visualization import ActionVisualizer
from mmaction.visualization import LocalVisBackend as VideoVisBackend

default_scope = 'mmaction'
model = dict(
    type=Recognizer2D,
    backbone=dict(
        type=ResNet,
        pretrained='https://download.pytorch.org/models/resnet50-11ad3fa6.pth',
        depth=50,
        norm_eval=False,
    ),
    cls_head=dict(
        type=TSNHead,
        num_classes=101,
        in_channels=2048,
        spatial_type='avg',
        consensus=dict(type='AvgConsensus', dim=1),  # by name: TSNHead compares it with this text
        dropout_ratio=0.4,
        init_std=0.001,
        average_clips='prob',
    ),
    data_preprocessor=dict(
        type=ActionDataPreprocessor, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], format_shape='NCHW'
    ),
    train_cfg=None,
    test_cfg=None,
)

train_pipeline = [
    dict(type=OpenCVInit, io_backend='disk'),
    dict(type=SampleFrames, clip_len=1, frame_interval=1, num_clips=3),
    dict(type=OpenCVDecode),
    dict(type=Resize, scale=(-1, 256)),
    dict(type=MultiScaleCrop, input_size=224, scales=(1, 0.875, 0.75, 0.66), random_crop=False, max_wh_scale_gap=1),
    dict(type=Resize, scale=(224, 224), keep_ratio=False),
    dict(type=Flip, flip_ratio=0.5),
    dict(type=FormatShape, input_format='NCHW'),
    dict(type=PackActionInputs),
]
val_pipeline = [
    dict(type=OpenCVInit, io_backend='disk'),
    dict(type=SampleFrames, clip_len=1, frame_interval=1, num_clips=3, test_mode=True),
    dict(type=OpenCVDecode),
    dict(type=Resize, scale=(-1, 256)),
    dict(type=CenterCrop, crop_size=224),
    dict(type=FormatShape, input_format='NCHW'),
    dict(type=PackActionInputs),
]
test_pipeline = [
    dict(type=OpenCVInit, io_backend='disk'),
    dict(type=SampleFrames, clip_len=1, frame_interval=1, num_clips=25, test_mode=True),
    dict(type=OpenCVDecode),
    dict(type=Resize, scale=(-1, 256)),
    dict(type=TenCrop, crop_size=224),
    dict(type=FormatShape, input_format='NCHW'),
    dict(type=PackActionInputs),
]
videos = dict(video='data/ucf101/videos')
train_list, val_list = (f'data/ucf101/ucf101_{part}_split_1_videos.txt' for part in ('train', 'val'))
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=VideoDataset, ann_file=train_list, data_prefix=videos, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=VideoDataset, ann_file=val_list, data_prefix=videos, pipeline=val_pipeline, test_mode=True),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=VideoDataset, ann_file=val_list, data_prefix=videos, pipeline=test_pipeline, test_mode=True),
)
val_evaluator = test_evaluator = dict(type=AccMetric)

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=75, val_begin=1, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
param_scheduler = [dict(type=MultiStepLR, begin=0, end=75, by_epoch=True, milestones=[30, 60], gamma=0.1)]
optim_wrapper = dict(
    optimizer=dict(type=SGD, lr=0.001, momentum=0.9, weight_decay=0.0005), clip_grad=dict(max_norm=40, norm_type=2)
)
auto_scale_lr = dict(enable=False, base_batch_size=256)

default_hooks.update(
    runtime_info=dict(type=RuntimeInfoHook),
    logger=dict(interval=20, ignore_last=False),
    checkpoint=dict(interval=3, save_best='auto', max_keep_ckpts=3),
    sync_buffers=dict(type=SyncBuffersHook),
)
visualizer = dict(type=ActionVisualizer, vis_backends=[dict(type=VideoVisBackend)])
log_processor = dict(type=LogProcessor, window_size=20, by_epoch=True)
