# Table 12, GN, ResNet-50. The paper does not say the groups; 32 are those of the GN paper.
_base_ = 'resnet50_bn_imagenet.py'
model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=32)))
