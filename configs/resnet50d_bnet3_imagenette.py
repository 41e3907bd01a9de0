# Imagenette, BNET-3, ResNet-50-D (xresnet). All norms, as in the reimplementation.
_base_ = 'resnet50d_bn_imagenette.py'
model = dict(backbone=dict(type='WithBNET', base='ResNetV1d', bnet=dict(k=3, where='all')))
