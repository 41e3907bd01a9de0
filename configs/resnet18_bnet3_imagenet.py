# Table 2, BNET-3, ResNet-18: the last norm of each basic block.
_base_ = 'resnet18_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C')))
