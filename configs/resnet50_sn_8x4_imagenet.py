# SN model zoo, ResNet50v1+SN (8,4), 100 epochs.
_base_ = 'resnet50_sn_8x32_imagenet.py'
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.0125))
auto_scale_lr = dict(base_batch_size=32)
