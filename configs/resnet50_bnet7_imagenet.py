# BNET-7, ResNet-50, the backbone of Table 5; settings as in Table 9.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=7, where='C')))
