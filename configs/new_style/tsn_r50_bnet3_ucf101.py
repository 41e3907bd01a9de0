# ../tsn_r50_bnet3_ucf101.py with imported types.
from mmengine.config import read_base

with read_base():
    from .tsn_r50_bn_ucf101 import *
from bnet_mm import WithBNET

model['backbone'].update(
    type=WithBNET,
    base=model['backbone']['type'],
    bnet=dict(k=3, where='C'),
    pretrained=f'{checkpoints}/R50_BNET-3.pth',
)
