# Table 5, BNET-5, 3x multi-scale, ResNet-101.
_base_ = 'faster_rcnn_r101_bn_3x.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        bnet=dict(k=5, where='C'),
        init_cfg=dict(type='Pretrained', checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/R101_BNET-5.pth'),
    )
)
