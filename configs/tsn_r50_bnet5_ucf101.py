# Table 8, BNET-5, TSN.
_base_ = 'tsn_r50_bn_ucf101.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        bnet=dict(k=5, where='C'),
        pretrained='{{$BNET_CHECKPOINTS:checkpoints}}/R50_BNET-5.pth',
    )
)
