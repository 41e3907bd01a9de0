# Table 2, BN, ResNet-18. 4 GPUs x 64 images, section 4.1.1; crops, flips and initialisation are mmpretrain's.
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
train_dataloader = dict(batch_size=64)
