# imagenette_r18_4_epochs.py with a sixth of the training images: 1568 = 49 x 32, so that batches of up to 32 are full.
_base_ = './imagenette_r18_4_epochs.py'
train_dataloader = dict(dataset=dict(indices=list(range(0, 9408, 6))))
