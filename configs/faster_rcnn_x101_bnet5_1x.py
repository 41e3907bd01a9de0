# Table 5, BNET-5, ResNeXt-101. Its backbone was not released: resnext101_bnet5_imagenet.py trains it.
_base_ = 'faster_rcnn_x101_bn_1x.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNeXt',
        bnet=dict(k=5, where='C'),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/resnext101_bnet5_imagenet.pth',
            prefix='backbone',
        ),
    )
)
