# Table 2, BNET-3, ResNet-101, as in the official code: the depthwise weights are frozen after the epoch of index 60.
_base_ = 'resnet101_bnet3_imagenet.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat', 'bnet_mm.engine.hooks'], allow_failed_imports=False)
custom_hooks = [dict(type='FreezeTransform', epoch=60)]
find_unused_parameters = True  # with several GPUs: frozen weights get no gradient
