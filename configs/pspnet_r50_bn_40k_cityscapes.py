# Tables 1 and 7, BN, PSPNet. 8 GPUs x 2 images, section 4.3. The plain ResNet, not mmseg's V1c, has the printed FLOPs.
# Optimizer, momentum, least rate, augmentation, auxiliary head, SyncBN and whole-image testing are mmseg's.
_base_ = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
model = dict(
    pretrained=None,
    backbone=dict(type='ResNet', init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
