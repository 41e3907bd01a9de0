# imagenette_r18.py with bottlenecks: ResNet-50 of a quarter of the width.
_base_ = './imagenette_r18.py'
model = dict(backbone=dict(depth=50, stem_channels=16, base_channels=16), head=dict(in_channels=512))
