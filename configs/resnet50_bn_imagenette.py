# Imagenette, BN, ResNet-50. The README of this reimplementation prints no setting and no result: images of 128 pixels,
# batch, rate, betas, decay and 5 epochs are those of its notebook; its optimizers (Ranger and others) are in no
# library, RAdam is the nearest. Its networks have one block per stage; here each has mmpretrain's depth 50 and ReLU.
_base_ = [
    'mmpretrain::_base_/models/resnet50.py',
    'mmpretrain::_base_/datasets/imagenet_bs32.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
model = dict(head=dict(num_classes=10))
data_preprocessor = dict(num_classes=10)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128)),
    dict(type='RandomFlip', prob=0.2, direction='horizontal'),
    dict(type='RandomFlip', prob=0.4, direction='vertical'),
    dict(type='RandomCrop', crop_size=128, padding=4),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128)),
    dict(type='PackInputs'),
]
data_root = 'data/imagenette2'
train_dataloader = dict(
    dataset=dict(_delete_=True, type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline)
)
val_dataloader = dict(
    dataset=dict(_delete_=True, type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline)
)
test_dataloader = val_dataloader

optim_wrapper = dict(optimizer=dict(type='RAdam', lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=1e-3))
param_scheduler = dict(type='CosineAnnealingLR', T_max=4, begin=1, end=5, eta_min=0, by_epoch=True)  # flat, then cosine
train_cfg = dict(by_epoch=True, max_epochs=5, val_interval=1)
val_cfg = dict()
test_cfg = dict()
