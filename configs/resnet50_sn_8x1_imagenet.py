# SN model zoo, ResNet50v1+SN (8,1), 100 epochs: IN and LN only, for one image has no batch statistics of its own.
_base_ = 'resnet50_sn_8x32_imagenet.py'
model = dict(backbone=dict(norm_cfg=dict(using_bn=False)))
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(optimizer=dict(lr=0.003125))
auto_scale_lr = dict(base_batch_size=8)
