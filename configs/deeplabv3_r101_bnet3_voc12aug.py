# Table 15, BNET-3, DeepLabV3.
_base_ = 'deeplabv3_r101_bn_voc12aug.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        bnet=dict(k=3, where='C'),
        init_cfg=dict(type='Pretrained', checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/R101_BNET-3.pth'),
    )
)
