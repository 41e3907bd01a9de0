# Table 2, BNET-3, ResNeXt-50.
_base_ = 'resnext50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNeXt', bnet=dict(k=3, where='C')))
