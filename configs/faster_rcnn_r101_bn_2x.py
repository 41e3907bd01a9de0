# BN beside README model zoo 1, Faster R-CNN, 2x, ResNet-101, which prints none.
_base_ = 'faster_rcnn_r50_bn_2x.py'
model = dict(backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101')))
