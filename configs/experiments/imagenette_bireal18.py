# imagenette_r18.py with Bi-Real Net 18, whose inner convolutions have binary weights and inputs; Adam as in its own
# code. It has one width only.
_base_ = './imagenette_r18.py'
model = dict(backbone=dict(_delete_=True, type='BiRealResNet', depth=18), head=dict(in_channels=512))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='Adam', lr=1e-3))
