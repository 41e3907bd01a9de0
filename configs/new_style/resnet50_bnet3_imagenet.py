# ../resnet50_bnet3_imagenet.py with imported types.
from mmengine.config import read_base

with read_base():
    from .resnet50_bn_imagenet import *
from bnet_mm import WithBNET

model['backbone'].update(type=WithBNET, base=model['backbone']['type'], bnet=dict(k=3, where='C'))
