# BNET-5, ResNet-101, the backbone of Tables 5, 6 and 13; settings as in Table 2.
_base_ = 'resnet101_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='C')))
