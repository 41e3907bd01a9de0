# Table 2, BN, ResNeXt-50. 8 GPUs x 32 images, section 4.1.1; 32x4d, crops, flips and initialisation are mmpretrain's.
_base_ = 'mmpretrain::resnext/resnext50-32x4d_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
