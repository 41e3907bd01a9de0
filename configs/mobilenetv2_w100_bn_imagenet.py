# Table 3, BN, MobileNetV2 (1.0). 8 GPUs x 32 images, section 4.1.2, whose 256 is read as the total of all GPUs.
_base_ = 'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=4e-5))
param_scheduler = dict(
    _delete_=True, type='CosineAnnealingLR', T_max=150, end=150, eta_min=0, by_epoch=True, convert_to_iter_based=True
)
train_cfg = dict(max_epochs=150)
