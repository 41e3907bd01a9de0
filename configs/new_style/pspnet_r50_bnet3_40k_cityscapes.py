# ../pspnet_r50_bnet3_40k_cityscapes.py with imported types.
from mmengine.config import read_base

with read_base():
    from .pspnet_r50_bn_40k_cityscapes import *
from bnet_mm import WithBNET

model['backbone'].update(
    type=WithBNET,
    base=model['backbone']['type'],
    bnet=dict(k=3, where='C'),
    init_cfg=dict(type='Pretrained', checkpoint=f'{checkpoints}/R50_BNET-3.pth'),
)
