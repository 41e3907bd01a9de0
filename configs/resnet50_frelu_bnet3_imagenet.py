# Section 3.3, FReLU and BNET-3, ResNet-50.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', frelu=True, bnet=dict(k=3, where='C')))
