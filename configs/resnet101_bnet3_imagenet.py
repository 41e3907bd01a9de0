# Table 2, BNET-3, ResNet-101.
_base_ = 'resnet101_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
