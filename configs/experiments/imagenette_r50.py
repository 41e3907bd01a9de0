# imagenette_r18_64px.py with bottlenecks: ResNet-50 of a quarter of the width.
_base_ = './imagenette_r18_64px.py'
model = dict(backbone=dict(depth=50, stem_channels=16, base_channels=16), head=dict(in_channels=512))
