# Imagenette, BNET-3, ResNeSt-50. All norms, as in the reimplementation.
_base_ = 'resnest50_bn_imagenette.py'
model = dict(backbone=dict(type='WithBNET', base='ResNeSt', bnet=dict(k=3, where='all')))
