# imagenette_r18_64px.py with Bi-Real Net 18 of half of the width, whose inner convolutions have binary weights and
# inputs; Adam as in its own code.
_base_ = './imagenette_r18_64px.py'
model = dict(backbone=dict(_delete_=True, type='BiRealResNet', depth=18, base_channels=32), head=dict(in_channels=256))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='Adam', lr=1e-3))
