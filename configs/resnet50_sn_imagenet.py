# Table 12, SN, ResNet-50. The paper does not say the batch of SN; as for the others, 4 GPUs x 64 images.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(norm_cfg=dict(type='SN')))
