# BN beside Table 5, 3x multi-scale, ResNet-50, which prints none. Scales, epochs and steps: mmdet's multi-scale 3x.
_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_ms-3x_coco.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
