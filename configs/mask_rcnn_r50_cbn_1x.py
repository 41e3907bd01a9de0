# CBN README, Mask R-CNN, CBN in FPN, box head and mask head.
_base_ = 'mask_rcnn_r50_nonorm_1x.py'
norm_cfg = dict(type='CBN', buffer_num=3, burnin=8)
model = dict(
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(bbox_head=dict(norm_cfg=norm_cfg), mask_head=dict(norm_cfg=norm_cfg)),
)
custom_hooks = [dict(type='CBNBurnIn')]
