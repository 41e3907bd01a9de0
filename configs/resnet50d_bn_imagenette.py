# Imagenette, BN, ResNet-50-D (xresnet).
_base_ = 'resnet50_bn_imagenette.py'
model = dict(backbone=dict(type='ResNetV1d'))
