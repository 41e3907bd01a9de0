# BN beside Table 5, 3x multi-scale, ResNet-101, which prints none.
_base_ = 'faster_rcnn_r50_bn_3x.py'
model = dict(backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101')))
