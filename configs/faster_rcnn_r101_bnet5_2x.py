# README model zoo 1, Faster R-CNN, BNET-5, 2x, ResNet-101.
_base_ = 'faster_rcnn_r101_bn_2x.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        bnet=dict(k=5, where='C'),
        init_cfg=dict(type='Pretrained', checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/R101_BNET-5.pth'),
    )
)
