# Table 3, BN, MobileNetV2 (0.25).
_base_ = 'mobilenetv2_w100_bn_imagenet.py'
model = dict(backbone=dict(widen_factor=0.25))
