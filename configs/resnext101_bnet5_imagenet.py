# BNET-5, ResNeXt-101, the backbone of Table 5; settings as for the ResNeXt-50 of Table 2.
_base_ = 'resnext101_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNeXt', bnet=dict(k=5, where='C')))
