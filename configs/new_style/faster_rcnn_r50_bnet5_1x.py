# ../faster_rcnn_r50_bnet5_1x.py with imported types.
from mmengine.config import read_base

with read_base():
    from .faster_rcnn_r50_bn_1x import *
from bnet_mm import WithBNET

model['backbone'].update(
    type=WithBNET,
    base=model['backbone']['type'],
    bnet=dict(k=5, where='C'),
    init_cfg=dict(type='Pretrained', checkpoint=f'{checkpoints}/R50_BNET-5.pth'),
)
