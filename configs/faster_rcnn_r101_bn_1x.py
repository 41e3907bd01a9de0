# Table 5, BN, ResNet-101. Schedule, batch and image size are mmdet's 1x, as the paper's.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
