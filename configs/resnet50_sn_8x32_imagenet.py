# SN model zoo, ResNet50v1+SN (8,32), 100 epochs. Printed steps 30, 60, 90, 10 are read as 30, 60, 90. Not printed and
# not here: the official code also jitters the colours and drops out half of the features before the classifier.
_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
model = dict(backbone=dict(norm_cfg=dict(type='SN')))
