# SN model zoo, ResNet101v2+SN (8,32), 120 epochs.
_base_ = 'resnet50v2_sn_120e_imagenet.py'
model = dict(backbone=dict(depth=101))
