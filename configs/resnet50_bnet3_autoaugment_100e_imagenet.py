# Table 4, BNET-3, ResNet-50, AutoAugment, 100 epochs.
_base_ = 'resnet50_bn_autoaugment_100e_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
