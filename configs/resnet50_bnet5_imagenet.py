# Table 9, BNET-5, ResNet-50.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='C')))
