# Tables 1 and 7, BNET-3, PSPNet.
_base_ = 'pspnet_r50_bn_40k_cityscapes.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        bnet=dict(k=3, where='C'),
        init_cfg=dict(type='Pretrained', checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/R50_BNET-3.pth'),
    )
)
