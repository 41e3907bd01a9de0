"""Long use of one model: memory, and many threads.

The long form: pytest -m hardening tests/hardening/test_soak.py -rP
"""

import gc
import random
import threading
import time

import pytest
import torch

from bnet_mm.ops.dispatch import load_backend
from helpers import reference
from helpers.hosts import import_host_models
from helpers.nets import small_net

KEPT = 256 * 2**20  # bytes that the kernels hold at most, csrc/memory.h


def resident():
    """Bytes of this process in memory."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith('VmRSS'))


def held():
    """Bytes that the kernels keep for reuse."""
    return torch.ops.bnet_mm.cpu_memory_held() if load_backend('cpp')[0] else 0


def detector():
    """RetinaNet over a narrow ResNet-18 with BNET at C of its blocks, as a config says it."""
    pytest.importorskip('mmdet')
    import_host_models('mmdet')
    from mmdet.models.utils import unpack_gt_instances  # noqa: F401  (a defect of the installation shows here)
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    cfg = Config.fromstring("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'", '.py').model
    narrow = dict(type='WithBNET', base='ResNet', bnet=dict(k=3, where='C'), base_channels=8, stem_channels=8)
    cfg.backbone.update(**narrow, init_cfg=None, frozen_stages=-1, norm_eval=False)
    cfg.neck.update(in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5)
    cfg.bbox_head.update(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)
    cfg.test_cfg.update(nms_pre=50, max_per_img=10)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg)


def data(rng, sizes):
    from mmdet.testing import demo_mm_inputs

    height, width = rng.choice(sizes), rng.choice(sizes)
    return demo_mm_inputs(2, (3, height, width), num_items=[2, 1], num_classes=3)


@pytest.mark.parametrize('steps', [24, pytest.param(5000, marks=pytest.mark.hardening)])
@pytest.mark.parametrize('training', [True, False])
def test_memory_does_not_grow(steps, training):
    """Images of changing sizes; what is resident after a tenth of the steps may grow by 1 % (short form: 10 %)."""
    torch.manual_seed(0)
    model, rng = detector().train(training), random.Random(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    first, most = None, 0
    for step in range(steps):
        batch = model.data_preprocessor(data(rng, (32, 40, 48, 64, 80)), training)
        if training:
            losses = model(**batch, mode='loss')
            optimizer.zero_grad()
            sum(sum(value) if isinstance(value, list) else value for value in losses.values()).backward()
            optimizer.step()
        else:
            with torch.no_grad():
                model(**batch, mode='predict')
        most = max(most, held())
        if step == steps // 10:
            gc.collect()
            first = resident()
    gc.collect()
    growth = resident() / first - 1
    print(
        f'{steps} steps, training={training}: {first / 2**20:.0f} MiB, grew by {growth:.2%}; held at most {most} bytes'
    )
    assert growth < (0.01 if steps >= 5000 else 0.1)
    assert most <= KEPT and torch.isfinite(next(model.parameters())).all()


@pytest.mark.parametrize('sizes', [8, pytest.param(400, marks=pytest.mark.hardening)])
def test_large_maps_are_held_within_bounds(sizes):
    """Large maps, whose memory the kernels keep for reuse."""
    from bnet_mm import BNET

    layer, rng, most = BNET(4, 3).eval(), random.Random(0), 0
    first = None
    for step in range(sizes):
        with torch.no_grad():
            layer(torch.ones(1, 4, rng.randint(1500, 2500), 1500))
        most = max(most, held())
        if step == max(3, sizes // 10):
            first = resident()
    print(f'held at most {most / 2**20:.0f} MiB; grew by {(resident() - first) / 2**20:.0f} MiB')
    assert most <= KEPT and resident() - first < 2 * KEPT


@pytest.mark.parametrize('seconds', [0.5, pytest.param(60, marks=pytest.mark.hardening)])
@pytest.mark.parametrize('kind', ['BNET', 'BNET over SN', 'BNET over GN', 'SN'])
def test_threads_share_a_model(kind, seconds):
    """8 Python threads call one model, each with its own inputs of its own sizes."""
    from helpers.damage import KINDS

    net = reference.randomise(small_net(lambda channels: KINDS[kind]())).eval()
    inputs = [torch.randn(1 + i % 3, 3, 9 + 3 * i, 11 + 2 * i) for i in range(8)]
    with torch.no_grad():
        want = [net(x) for x in inputs]
    wrong, calls, end = [], [0] * len(inputs), time.monotonic() + seconds

    def work(number):
        with torch.no_grad():
            while time.monotonic() < end or not calls[number]:
                y = net(inputs[number])
                calls[number] += 1
                if not torch.equal(y, want[number]):
                    wrong.append((number, (y - want[number]).abs().max().item()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f'{kind}: {sum(calls)} calls, {len(wrong)} wrong')
    assert not wrong
