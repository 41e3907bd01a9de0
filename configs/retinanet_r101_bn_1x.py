# Table 13, BN, ResNet-101. Appendix B prints the rate 0.02 (mmdet: 0.01). Batch and image size are mmdet's.
_base_ = 'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
optim_wrapper = dict(optimizer=dict(lr=0.02))
