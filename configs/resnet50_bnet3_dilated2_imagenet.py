# Table 9, BNET-3 with dilation 2, ResNet-50.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C', dilation=2)))
