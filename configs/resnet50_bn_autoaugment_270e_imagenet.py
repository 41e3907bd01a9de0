# Table 4, BN, ResNet-50, AutoAugment, 270 epochs.
_base_ = 'resnet50_bn_autoaugment_100e_imagenet.py'
param_scheduler = dict(milestones=[80, 160, 240])
train_cfg = dict(max_epochs=270)
