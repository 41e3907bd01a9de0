# What the four libraries' configs share: hooks, environment, log.
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.visualization import LocalVisBackend

# mmengine defers the imports of new-style configs, and these have no custom_imports.
__import__('bnet_mm.host.compat')
checkpoints = __import__('os').environ.get('BNET_CHECKPOINTS', 'checkpoints')

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=50),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type=LocalVisBackend)]
log_level = 'INFO'
load_from = None
resume = False
