# SN model zoo, ResNet50v2+SN (8,32), 120 epochs.
_base_ = 'resnet50_sn_120e_imagenet.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat', 'bnet_mm.models'], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, type='ResNetV2', depth=50, norm_cfg=dict(type='SN')))
