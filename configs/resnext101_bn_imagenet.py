# BN, ResNeXt-101, the baseline of the backbone of Table 5; settings as for the ResNeXt-50 of Table 2.
_base_ = 'mmpretrain::resnext/resnext101-32x4d_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
