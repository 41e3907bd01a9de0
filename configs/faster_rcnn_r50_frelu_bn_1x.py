# Section 3.3, FReLU, ResNet-50. The paper does not name detector and schedule: those of Table 5.
_base_ = 'faster_rcnn_r50_bn_1x.py'
model = dict(
    backbone=dict(
        type='WithBNET',
        base='ResNet',
        frelu=True,
        bnet=None,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/resnet50_frelu_bn_imagenet.pth',
            prefix='backbone',
        ),
    )
)
