"""What each of two gloo processes computes with the norms that join their statistics."""

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnet_mm import BNET, CBN, SyncSN
from bnet_mm.layers.sync_batch_norm import AffineSyncBatchNorm, SyncBatchNorm
from helpers import reference

STEPS, SIZES = 3, [(1, 4), (3, 2), (2, 0)]  # images of each process in each step; an empty batch as well


def converted(layer):
    return nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))


CASES = {
    'BNET over SyncBN': lambda: BNET(5, k=3, norm='SyncBN'),
    'BNET over SyncBN, average': lambda: BNET(5, k=5, norm=dict(type='SyncBN', momentum=None)),
    'BNET over SyncBN, no tracking': lambda: BNET(5, k=3, norm=dict(type='SyncBN', track_running_stats=False)),
    'BNET converted': lambda: converted(BNET(5, k=3)),
    'SyncBatchNorm': lambda: SyncBatchNorm(5, eps=1e-2),
    'torch SyncBatchNorm without GPU': lambda: AffineSyncBatchNorm.from_host(nn.SyncBatchNorm(5, eps=1e-2)),
    'SyncSN': lambda: SyncSN(5),
    'SyncSN, average': lambda: SyncSN(5, using_moving_average=False),
    'BNET over SyncSN': lambda: BNET(5, k=3, norm='SyncSN'),
}


def build(case):
    torch.manual_seed(3)
    layer = reference.randomise(CASES[case]().double()).train()
    for module in layer.modules():
        if hasattr(module, 'mean_weight'):
            nn.init.normal_(module.mean_weight), nn.init.normal_(module.var_weight)
    return layer


def batches(step):
    """Inputs and output weights of both processes; far from mean 0, where a difference of squares would cancel."""
    torch.manual_seed(step)
    shapes = [(n, 5, 6, 7) for n in SIZES[step]]
    return [(torch.randn(s).double() * 2 + 50 * (p + 1), torch.randn(s).double()) for p, s in enumerate(shapes)]


def run(layer, steps):
    """Outputs, gradients and statistics of some steps, and the output in evaluation."""
    log = []
    for x, weight in steps:
        x = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(x)
        (y * weight).sum().backward()
        gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
        buffers = {name: b.clone() for name, b in layer.named_buffers()}
        log.append(dict(y=y.detach(), x_grad=x.grad, gradients=gradients, buffers=buffers))
    return log


def differences(layer, x, weight):
    """d loss / d parameter by central differences, of the sum of the processes' losses, in step with each other."""
    result, h = {}, 1e-5
    for name, parameter in layer.named_parameters():
        result[name] = torch.empty_like(parameter)
        for i in range(parameter.numel()):
            losses = []
            for sign in (1, -1):
                twin = copy.deepcopy(layer)
                twin.get_parameter(name).data.view(-1)[i] += sign * h
                losses.append((twin(x) * weight).sum().detach())
                dist.all_reduce(losses[-1])
            result[name].view(-1)[i] = (losses[0] - losses[1]) / (2 * h)
    return result


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.conv, self.layer = nn.Conv2d(5, 5, 3), layer

    def forward(self, x):
        return self.layer(self.conv(x))


def worker(rank, folder):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    results = {}
    for case in CASES:
        layer = build(case)
        steps = [batches(step)[rank] for step in range(STEPS)]
        results[case] = run(layer, steps)
        if case in ('SyncSN', 'BNET over SyncSN'):
            results[f'{case}, differences'] = differences(layer, *steps[0])
    results['ddp'] = ddp_step(rank)
    results['cbn'] = cbn_steps(rank)
    alone = SyncBatchNorm(5).double()
    try:
        alone(torch.randn(1 - rank, 5, 1, 1, dtype=torch.float64))
    except ValueError as error:
        results['one value'] = str(error)
    torch.save(results, f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


def ddp_step(rank):
    """A step of a network with converted BNET under DDP, which refuses torch's SyncBatchNorm on a CPU."""
    torch.manual_seed(3)
    net = reference.randomise(Net(BNET(5, k=3)).double())
    net = DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(net))
    x, weight = batches(0)[rank]
    (net(x) * weight[:, :, 1:-1, 1:-1]).sum().backward()
    return {name: p.grad for name, p in net.module.named_parameters()}


def cbn_steps(rank):
    """CBN under DDP: the slopes that are taken inside forward must not reach DDP's reducer."""
    torch.manual_seed(3)
    net = DistributedDataParallel(reference.randomise(Net(CBN(5)).double()), broadcast_buffers=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    log = []
    for step in range(2):
        x, weight = batches(step)[rank]
        optimizer.zero_grad()
        (net(x) * weight[:, :, 1:-1, 1:-1]).sum().backward()
        log.append((net.module.conv.weight.detach().clone(), net.module.conv.weight.grad.clone()))
        optimizer.step()
    return log
