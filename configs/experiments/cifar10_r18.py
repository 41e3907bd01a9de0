# The network of imagenette_r18.py, fine-tuned on a fifth of CIFAR-10 (10,000 images), 64 pixels, 5 epochs, a tenth of
# the rate. CIFAR10 names a folder of train/ and test/ with a folder of images for each class.
_base_ = './imagenette_r18.py'
data_root = '{{$CIFAR10:data/cifar10}}'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='Resize', scale=64),
    dict(type='PackInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=64), dict(type='PackInputs')]
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline, indices=list(range(0, 50000, 5))))
val_dataloader = dict(dataset=dict(data_root=data_root, data_prefix='test', pipeline=test_pipeline))
test_dataloader = val_dataloader
optim_wrapper = dict(optimizer=dict(lr=0.01))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', T_max=5, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=5)
