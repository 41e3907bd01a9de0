# The demo: faster_rcnn_r18_bn_demo.py with BNET-5.
_base_ = './faster_rcnn_r18_bn_demo.py'

model = dict(backbone=dict(type='WithBNET', base='ResNet', bnet=dict(k=5, where='C')))
