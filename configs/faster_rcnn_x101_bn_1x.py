# Table 5, BN, ResNeXt-101. The paper does not say the width: 32x4d has the printed parameters and FLOPs.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_x101-32x4d_fpn_1x_coco.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
