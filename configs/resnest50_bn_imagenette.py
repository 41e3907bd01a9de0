# Imagenette, BN, ResNeSt-50.
_base_ = 'resnet50_bn_imagenette.py'
model = dict(backbone=dict(type='ResNeSt'))
