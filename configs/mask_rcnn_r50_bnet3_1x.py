# Table 6, BNET-3, ResNet-50.
_base_ = 'mask_rcnn_r50_bn_1x.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        bnet=dict(k=3, where='C'),
        init_cfg=dict(type='Pretrained', checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/R50_BNET-3.pth'),
    )
)
