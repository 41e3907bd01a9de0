# Table 3, BN, Bi-Real Net. 8 GPUs x 64 images, section 4.1.2. The paper does not say the depth: 18 has the printed
# FLOPs. It refers to the official PyTorch code for the rest: label smoothing, lighting noise, no weight decay.
_base_ = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
custom_imports = dict(imports=['bnet_mm', 'bnet_mm.host.compat', 'bnet_mm.models'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='BiRealResNet', depth=18),
    head=dict(loss=dict(_delete_=True, type='LabelSmoothLoss', label_smooth_val=0.1)),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224),
    dict(
        type='Lighting',
        eigval=[55.4625, 4.7940, 1.1475],
        eigvec=[[-0.5836, -0.6948, 0.4203], [-0.5808, -0.0045, -0.8140], [-0.5675, 0.7192, 0.4009]],  # rows B, G, R
        alphastd=0.1,
        to_rgb=False,
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='Adam', lr=1e-3))
param_scheduler = dict(_delete_=True, type='PolyLR', power=1, eta_min=0, end=257, by_epoch=True)  # 0 at epoch 256
train_cfg = dict(max_epochs=256)
auto_scale_lr = dict(base_batch_size=512)
