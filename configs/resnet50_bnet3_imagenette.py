# Imagenette, BNET-3, ResNet-50. All norms, as in the reimplementation.
_base_ = 'resnet50_bn_imagenette.py'
model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='all')))
