# Tables 1 and 8, BN, TSN. 8 GPUs x 32 videos, section 4.4, whose 256 is read as the total. Epochs, weight decay and
# initialisation: mmaction2's UCF-101 config (tsn_r50_1x1x3_75e_ucf101_rgb, not in its wheel). The rest is inherited.
_base_ = 'mmaction::recognition/tsn/tsn_imagenet-pretrained-r50_8xb32-1x1x3-100e_kinetics400-rgb.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat'], allow_failed_imports=False)
model = dict(cls_head=dict(num_classes=101, init_std=0.001))

decoder = dict(DecordInit='OpenCVInit', DecordDecode='OpenCVDecode')
train_pipeline = [dict(step, type=decoder.get(step['type'], step['type'])) for step in _base_.train_pipeline]
val_pipeline = [dict(step, type=decoder.get(step['type'], step['type'])) for step in _base_.val_pipeline]
test_pipeline = [dict(step, type=decoder.get(step['type'], step['type'])) for step in _base_.test_pipeline]
videos = dict(video='data/ucf101/videos')
train_list, val_list = (f'data/ucf101/ucf101_{part}_split_1_videos.txt' for part in ('train', 'val'))
train_dataloader = dict(dataset=dict(ann_file=train_list, data_prefix=videos, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(ann_file=val_list, data_prefix=videos, pipeline=val_pipeline))
test_dataloader = dict(dataset=dict(ann_file=val_list, data_prefix=videos, pipeline=test_pipeline))

optim_wrapper = dict(optimizer=dict(lr=0.001, weight_decay=0.0005))
param_scheduler = [dict(type='MultiStepLR', by_epoch=True, begin=0, end=75, milestones=[30, 60], gamma=0.1)]
train_cfg = dict(max_epochs=75)
