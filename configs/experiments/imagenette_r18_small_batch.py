# imagenette_r18.py for steps of few images: every fourth training image (2368 of them, so that steps of up to 32 see all
# of them), 3 epochs, no warm-up, which would be longer for a larger step. Runs set batch size and rate.
_base_ = './imagenette_r18.py'
train_dataloader = dict(dataset=dict(indices=list(range(0, 9469, 4))))
param_scheduler = [dict(type='CosineAnnealingLR', T_max=3, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=3)
default_hooks = dict(logger=dict(interval=100))
