# CBN README, Faster R-CNN, norm '-': none in FPN and heads, BN in the backbone. 4 GPUs x 4 images, as in the official
# configs; losses, RoI sampling and proposals are mmdet 3.3's.
_base_ = 'faster_rcnn_r50_bn_1x.py'
model = dict(roi_head=dict(bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256)))
train_dataloader = dict(batch_size=4, num_workers=4)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]
