"""Training steps of small networks under torch's FullyShardedDataParallel and DistributedDataParallel, on gloo."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import always_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from bnet_mm import BNET, CBN, BNConv, FReLU, SN2d
from helpers import reference

CASES = {
    **{f'BNET over {norm}': lambda norm=norm: BNET(8, norm=norm) for norm in ('BN', 'SyncBN', 'IN', 'SN', 'SyncSN')},
    'BNET over GN': lambda: BNET(8, norm=dict(type='GN', num_groups=2)),
    'BNET with k=1': lambda: BNET(8, k=1),
    'SN': lambda: SN2d(8),
    'BNConv': lambda: BNConv(8),
    'FReLU': lambda: FReLU(8),
}
CBN_CASES = {'CBN': lambda: CBN(8), 'BNET over CBN': lambda: BNET(8, norm='CBN')}


def wrap_everything(net):
    return FullyShardedDataParallel(net, auto_wrap_policy=always_wrap_policy, device_id=torch.device('cpu'))


def wrap_as_one(net):
    return FullyShardedDataParallel(net, device_id=torch.device('cpu'))


def losses(make, wrap):
    """Of two training steps of a convolution, the layer, and another convolution."""
    torch.manual_seed(3)
    net = wrap(reference.randomise(nn.Sequential(nn.Conv2d(3, 8, 3), make(), nn.Conv2d(8, 4, 3))).train())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    found = []
    for step in range(2):
        torch.manual_seed(10 * step + dist.get_rank())
        loss = net(torch.randn(2, 3, 9, 9)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    results = {}
    for name, make in CASES.items():
        results[name] = losses(make, wrap_everything), losses(make, DistributedDataParallel)
    for name, make in CBN_CASES.items():
        results[name] = losses(make, wrap_as_one), losses(make, DistributedDataParallel)
        try:
            losses(make, wrap_everything)
        except RuntimeError as error:
            results[f'{name}, error'] = str(error)
    torch.save(results, f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()
