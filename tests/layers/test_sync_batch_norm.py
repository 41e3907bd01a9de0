"""Norms over two gloo processes with unequal batches against one process on the joined batch, in float64."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from bnet_mm import BNET, CBN
from bnet_mm.layers.sync_batch_norm import SyncBatchNorm
from helpers import reference
from helpers.two_processes import CASES, STEPS, Net, batches, build, run, worker

TOLERANCE = dict(rtol=1e-10, atol=1e-10)


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


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_statistics_in_evaluation_are_the_running_ones(backend, monkeypatch):
    """Also where the whole norm is not one operation: under the reference, in compiled and exported graphs."""
    monkeypatch.setenv('BNET_MM_BACKEND', backend)
    layer = reference.randomise(BNET(6, k=3, norm='SyncBN')).eval()
    x = torch.randn(2, 6, 5, 7)
    _, mean, var = layer.norm.statistics(x)
    assert mean is layer.norm.running_mean and var is layer.norm.running_var
    x_hat = nn.functional.batch_norm(x, mean, var, eps=layer.norm.eps)
    torch.testing.assert_close(layer(x), reference.depthwise(x_hat, layer.bnconv.weight, layer.bnconv.bias))
