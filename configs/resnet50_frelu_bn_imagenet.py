# Section 3.3, FReLU, ResNet-50.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', frelu=True, bnet=None))
