# Table 4, BNET-3, ResNet-50, AutoAugment, 270 epochs.
_base_ = 'resnet50_bn_autoaugment_270e_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
