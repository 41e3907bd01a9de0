# Table 12, SN with enhancement, ResNet-50: BNET-3 over SN at C, SN elsewhere.
_base_ = 'resnet50_sn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
