# imagenette_r18_64px.py with MobileNetV2, a quarter of the width; weight decay and schedule of its paper's kind.
_base_ = './imagenette_r18_64px.py'
model = dict(
    backbone=dict(_delete_=True, type='MobileNetV2', widen_factor=0.25),
    head=dict(in_channels=1280),
)
optim_wrapper = dict(optimizer=dict(lr=0.05, weight_decay=4e-5))
