# Tables 2, 9, 11, 12, BN, ResNet-50. 4 GPUs x 64 images, section 4.1.1; crops, flips, initialisation: mmpretrain's.
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
train_dataloader = dict(batch_size=64)
