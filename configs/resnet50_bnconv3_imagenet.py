# Table 11, BN + Conv, ResNet-50. The paper does not say where in the bottleneck; C has its number of parameters.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(type='BNConv', k=3, where='C')))
