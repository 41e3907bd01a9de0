# Tables 2, 9, 10 (C), 11 and 12, BNET-3, ResNet-50.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
