# Section 3.3, FReLU and BNET-3, ResNet-50.
_base_ = 'faster_rcnn_r50_frelu_bn_1x.py'
model = dict(
    backbone=dict(
        bnet=dict(_delete_=True, k=3, where='C'),
        init_cfg=dict(checkpoint='{{$BNET_CHECKPOINTS:checkpoints}}/resnet50_frelu_bnet3_imagenet.pth'),
    )
)
