"""Norms over two gloo processes with unequal batches against one process on the joined batch, in float64."""

import copy
import os

import pytest
import reference
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnet_mm import BNET, CBN, SyncSN
from bnet_mm.layers.sync_batch_norm import AffineSyncBatchNorm, SyncBatchNorm

STEPS, SIZES = 3, [(1, 4), (3, 2), (2, 0)]  # images of each process in each step; an empty batch as well
TOLERANCE = dict(rtol=1e-10, atol=1e-10)


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


@pytest.fixture(scope='module')
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gloo')
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pth', weights_only=True) for rank in range(2)]


@pytest.mark.parametrize('case', CASES)
def test_two_processes_equal_the_joined_batch(processes, case):
    """Statistics, outputs, input gradients, and parameter gradients summed over the processes."""
    joined = [tuple(torch.cat(tensors) for tensors in zip(*batches(step))) for step in range(STEPS)]
    for step, want in enumerate(run(build(case), joined)):
        first, second = (results[case][step] for results in processes)
        torch.testing.assert_close(torch.cat([first['y'], second['y']]), want['y'], **TOLERANCE)
        torch.testing.assert_close(torch.cat([first['x_grad'], second['x_grad']]), want['x_grad'], **TOLERANCE)
        for name, value in want['gradients'].items():
            torch.testing.assert_close(first['gradients'][name] + second['gradients'][name], value, **TOLERANCE)
        for name, value in want['buffers'].items():
            for results in (first, second):
                torch.testing.assert_close(results['buffers'][name], value, **TOLERANCE)


def test_synchronised_bnet_is_batch_norm_of_the_joined_batch(processes):
    """The one-process side of the comparison above is itself the formula."""
    layer = build('BNET over SyncBN')
    x = torch.cat([x for x, _ in batches(0)])
    want = reference.bnet(x, layer.bnconv.weight, layer.bnconv.bias, *reference.batch_statistics(x))
    got = torch.cat([results['BNET over SyncBN'][0]['y'] for results in processes])
    torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.parametrize('case', ['SyncSN', 'BNET over SyncSN'])
def test_sync_sn_gradients_are_the_finite_differences(processes, case):
    """Of the mixing weights too, which the official backward gets wrong."""
    for name, want in processes[0][f'{case}, differences'].items():
        got = sum(results[case][0]['gradients'][name] for results in processes)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert any('mean_weight' in name for name in processes[0][f'{case}, differences'])


def test_ddp_on_a_cpu(processes):
    torch.manual_seed(3)
    net = reference.randomise(Net(BNET(5, k=3)).double())
    x, weight = (torch.cat(tensors) for tensors in zip(*batches(0)))
    (net(x) * weight[:, :, 1:-1, 1:-1]).sum().backward()
    for name, parameter in net.named_parameters():
        for results in processes:  # DDP averages where one process sums
            torch.testing.assert_close(results['ddp'][name] * 2, parameter.grad, **TOLERANCE)


def test_cbn_under_ddp(processes):
    """Each process has its own statistics; the gradients of the convolution are the average of both, and stay equal."""
    for step in range(2):
        torch.testing.assert_close(processes[0]['cbn'][step], processes[1]['cbn'][step], rtol=0, atol=0)
    torch.manual_seed(3)
    net = reference.randomise(Net(CBN(5)).double())
    twins = [net, copy.deepcopy(net)]
    for step in range(2):
        weight = processes[0]['cbn'][step][0]
        for twin, (x, output_weight) in zip(twins, batches(step)):
            twin.conv.weight.data.copy_(weight)
            twin.zero_grad()
            (twin(x) * output_weight[:, :, 1:-1, 1:-1]).sum().backward()
            if step == 0:  # the affine moves too, by DDP's average
                twin.gradient = [p.grad.clone() for p in twin.parameters()]
        want = sum(twin.conv.weight.grad for twin in twins) / 2
        torch.testing.assert_close(processes[0]['cbn'][step][1], want, **TOLERANCE)
        for twin in twins:
            for i, parameter in enumerate(twin.parameters()):
                parameter.data -= 1e-3 * (twins[0].gradient[i] + twins[1].gradient[i]) / 2


def test_one_value_over_all_processes_is_refused(processes):
    for results in processes:
        assert results['one value'].endswith(
            'more than one value per channel over all processes in training mode, got 1'
        )


def test_one_process_is_plain_batch_norm():
    layer, bn = SyncBatchNorm(3), nn.BatchNorm2d(3, affine=False)
    for _ in range(2):
        x = torch.randn(2, 3, 4, 5) + 3
        torch.testing.assert_close(layer(x), bn(x))
    for name, value in bn.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x))
    with pytest.raises(ValueError, match='input must be'):
        layer(torch.randn(3))
