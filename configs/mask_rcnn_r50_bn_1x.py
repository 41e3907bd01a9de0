# Table 6, BN, ResNet-50. Batch, image size and frozen stages are mmdet's 1x, as in Table 5.
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
