# CBN README, Faster R-CNN, CBN in FPN and box head.
_base_ = 'faster_rcnn_r50_nonorm_1x.py'
norm_cfg = dict(type='CBN', buffer_num=3, burnin=8)
model = dict(neck=dict(norm_cfg=norm_cfg), roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg)))
custom_hooks = [dict(type='CBNBurnIn')]
