# imagenette_r18.py with mmpretrain's AutoAugment policy of ImageNet, as in the paper's Table 4.
_base_ = ['./imagenette_r18.py', 'mmpretrain::_base_/datasets/pipelines/auto_aug.py']
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=96, crop_ratio_range=(0.35, 1.0)),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='AutoAugment', policies=_base_.policy_imagenet),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
