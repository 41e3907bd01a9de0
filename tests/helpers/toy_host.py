"""A host of a few lines: a classifier over mmdet's ResNet with data from nowhere, so that a whole training takes
milliseconds. For ``custom_imports``."""

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import nn
from torch.utils.data import Dataset


@DATASETS.register_module()
class ToyImages(Dataset):
    def __init__(self, length=2, size=16):
        self.length, self.size = length, size

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        image = torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(i))
        return dict(inputs=image, labels=i % 2)


@MODELS.register_module()
class ToyClassifier(BaseModel):
    def __init__(self, backbone, channels=32, ballast=0, data_preprocessor=None, init_cfg=None):
        super().__init__(data_preprocessor, init_cfg)
        self.backbone, self.fc = MODELS.build(backbone), nn.Linear(channels, 2)
        self.register_buffer('ballast', torch.zeros(ballast))  # makes checkpoints large

    def forward(self, inputs, labels, mode='tensor'):
        scores = self.fc(self.backbone(torch.stack(list(inputs)))[-1].mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, torch.as_tensor(labels)))
        return [dict(right=float(score.argmax() == label)) for score, label in zip(scores, labels)]


@METRICS.register_module()
class ToyAccuracy(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(accuracy=sum(result['right'] for result in results) / len(results))


CONFIG = """
default_scope = 'mmdet'
custom_imports = dict(imports=['bnet_mm', 'helpers.toy_host'], allow_failed_imports=False)
model = dict(
    type='ToyClassifier',
    backbone=dict(
        type='WithBNET', base='ResNet', bnet=dict(k=3, where='C'), depth=18, base_channels=4, stem_channels=4,
        norm_cfg=dict(type='BN', requires_grad=True), norm_eval=False, frozen_stages=-1, init_cfg=None,
    ),
)
dataset = dict(type='ToyImages', length=2)
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True), dataset=dataset)
val_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1, val_interval=1)
val_cfg = dict(type='ValLoop')
val_evaluator = dict(type='ToyAccuracy')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9))
param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[3], gamma=0.1)]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1), logger=dict(type='LoggerHook'))
auto_scale_lr = dict(enable=False, base_batch_size=2)
env_cfg = dict(cudnn_benchmark=False)
randomness = dict(seed=0)
log_level = 'ERROR'
"""
