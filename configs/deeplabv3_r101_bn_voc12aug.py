# Table 15, BN, DeepLabV3. Appendix D gives no setting: 4 GPUs x 4 images and the rest are mmseg's, its 40k schedule as
# in section 4.3 (it also has 20k). The plain ResNet, not mmseg's V1c, for the stem of the BNET backbones.
_base_ = 'mmseg::deeplabv3/deeplabv3_r101-d8_4xb4-40k_voc12aug-512x512.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
model = dict(
    pretrained=None,
    backbone=dict(type='ResNet', init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101')),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
