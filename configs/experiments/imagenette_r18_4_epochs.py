# imagenette_r18.py with 4 epochs for plans that set batch size and rate, and no warm-up, whose iterations would be more
# images with a larger batch.
_base_ = './imagenette_r18.py'
param_scheduler = [dict(type='CosineAnnealingLR', T_max=4, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(max_epochs=4)
