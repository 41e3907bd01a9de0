# Table 10, BNET-3 at A, B and C, ResNet-50. Two of the three check marks are printed; section 4.5 names all three.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='ABC')))
