# Table 12, GN with enhancement, ResNet-50: BNET-3 over GN at C, GN elsewhere.
_base_ = 'resnet50_gn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
