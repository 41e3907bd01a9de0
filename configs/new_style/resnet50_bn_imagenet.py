# ../resnet50_bn_imagenet.py with imported types.
from mmengine.config import read_base

with read_base():
    from ._base_.runtime import *
from mmengine.dataset import DefaultSampler
from mmengine.optim import MultiStepLR
from torch.optim import SGD

from mmpretrain.datasets import ImageNet
from mmpretrain.datasets.transforms import (
    CenterCrop,
    LoadImageFromFile,
    PackInputs,
    RandomFlip,
    RandomResizedCrop,
    ResizeEdge,
)
from mmpretrain.engine import VisualizationHook
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import CrossEntropyLoss, GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet
from mmpretrain.visualization import UniversalVisualizer

default_scope = 'mmpretrain'
model = dict(
    type=ImageClassifier,
    backbone=dict(type=ResNet, depth=50, num_stages=4, out_indices=(3,), style='pytorch'),
    neck=dict(type=GlobalAveragePooling),
    head=dict(
        type=LinearClsHead,
        num_classes=1000,
        in_channels=2048,
        loss=dict(type=CrossEntropyLoss, loss_weight=1.0),
        topk=(1, 5),
    ),
)
data_preprocessor = dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

train_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=RandomResizedCrop, scale=224),
    dict(type=RandomFlip, prob=0.5, direction='horizontal'),
    dict(type=PackInputs),
]
test_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=ResizeEdge, scale=256, edge='short'),
    dict(type=CenterCrop, crop_size=224),
    dict(type=PackInputs),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=5,
    dataset=dict(type=ImageNet, data_root='data/imagenet', split='train', pipeline=train_pipeline),
    sampler=dict(type=DefaultSampler, shuffle=True),
)
val_dataloader = test_dataloader = dict(
    batch_size=32,
    num_workers=5,
    dataset=dict(type=ImageNet, data_root='data/imagenet', split='val', pipeline=test_pipeline),
    sampler=dict(type=DefaultSampler, shuffle=False),
)
val_evaluator = test_evaluator = dict(type=Accuracy, topk=(1, 5))

train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)
val_cfg = dict()
test_cfg = dict()
param_scheduler = dict(type=MultiStepLR, by_epoch=True, milestones=[30, 60, 90], gamma=0.1)
optim_wrapper = dict(optimizer=dict(type=SGD, lr=0.1, momentum=0.9, weight_decay=0.0001))
auto_scale_lr = dict(base_batch_size=256)

default_hooks.update(logger=dict(interval=100), visualization=dict(type=VisualizationHook, enable=False))
visualizer = dict(type=UniversalVisualizer, vis_backends=vis_backends)
randomness = dict(seed=None, deterministic=False)
