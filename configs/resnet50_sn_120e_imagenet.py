# SN model zoo, ResNet50v1+SN (8,32), 120 epochs, warm-up and cosine; 5 epochs of warm-up as in the official code.
_base_ = 'resnet50_sn_8x32_imagenet.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=5, by_epoch=True, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=115, begin=5, end=120, eta_min=0, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=120)
