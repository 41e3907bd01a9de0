# Table 3, BNET-3, Bi-Real Net. The printed FLOPs (162 -> 173) fix no place; the norms of all 16 binary convolutions
# come nearest (+ 13.5 M, or + 12.0 M beside BN's own scaling; only the last one of each block would be + 6.8 M).
_base_ = 'bireal18_bn_imagenet.py'
model = dict(backbone=dict(type='WithBNET', base='BiRealResNet', bnet=dict(k=3, where='AC')))
