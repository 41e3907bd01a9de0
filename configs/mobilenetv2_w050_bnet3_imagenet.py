# Table 3, BNET-3, MobileNetV2 (0.5): after the expansion, the only place that has the printed FLOPs.
_base_ = 'mobilenetv2_w050_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='MobileNetV2', bnet=dict(k=3, where='A')))
