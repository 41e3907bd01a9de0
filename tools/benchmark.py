"""Time and memory of the norms side by side: python tools/benchmark.py norms [--out DIR]

All candidates are built first and take turns, so that a busy machine slows them alike; medians and their ratios to BN
are printed, and appended as rows to DIR/<what>.csv with device, versions and date.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bnet_mm.launch import UserError, run_tool
from bnet_mm.surgery import enhance
from bnet_mm.surgery.enhance import insert_bn_conv

GN = dict(type='GN', num_groups=32)
# name -> (norm_cfg of the whole stage, kernel size of BNET at C or None)
NORMS = {
    'BN': (dict(type='BN'), None),
    'BNET-3': (dict(type='BN'), 3),
    'BNET-5': (dict(type='BN'), 5),
    'BNET-7': (dict(type='BN'), 7),
    'BNConv-3 at C': (dict(type='BN'), 'BNConv'),
    'GN': (GN, None),
    'GN + BNET-3': (GN, 3),
    'IN': (dict(type='IN', affine=True), None),
    'IN + BNET-3': (dict(type='IN', affine=True), 3),
    'SN': (dict(type='SN'), None),
    'SN + BNET-3': (dict(type='SN'), 3),
    'SyncBN + BNET-3, one process': (dict(type='BNET', k=1, norm='SyncBN'), 3),
    'CBN, buffer_num=3': (dict(type='CBN', buffer_num=3), None),
    'CBN + BNET-3': (dict(type='CBN', buffer_num=3), 3),
}
FIELDS = ('date', 'device', 'torch', 'what', 'name', 'quantity', 'value', 'unit', 'ratio_to_bn', 'runs')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=['norms'], help='norms: one ResNet-50 stage with every norm, a training step')
    parser.add_argument('--out', default='tools/benchmark_results', help='folder of the CSV files')
    parser.add_argument('--runs', type=int, default=15, help='repetitions of each candidate (15)')
    args = parser.parse_args()
    if not Path(args.out).is_dir():
        raise UserError(f'--out {args.out}: no such folder')
    rows = benchmark_norms(args.runs)
    write(Path(args.out) / f'{args.what}.csv', args.what, rows, args.runs)


def benchmark_norms(runs: int) -> list[tuple[str, str, float, str]]:
    """Stage 2 of ResNet-50 (4 bottlenecks, 512 channels) on 8 maps of 256 x 56 x 56: (name, quantity, value, unit)."""
    torch.manual_seed(0)
    x = torch.randn(8, 256, 56, 56, requires_grad=True)
    stages = {name: stage(*options) for name, options in NORMS.items()}
    rows = [(name, 'saved for backward', saved_bytes(net, x) / 2**20, 'MiB') for name, net in stages.items()]
    rows += [(name, 'statistics', statistics_bytes(net) / 2**20, 'MiB') for name, net in stages.items()]
    seconds = interleaved({name: lambda net=net: step(net, x) for name, net in stages.items()}, runs)
    rows += [(name, 'training step', value * 1e3, 'ms') for name, value in seconds.items()]
    for net in stages.values():
        net.eval()
    with torch.no_grad():
        seconds = interleaved({name: lambda net=net: net(x) for name, net in stages.items()}, runs)
    return rows + [(name, 'inference', value * 1e3, 'ms') for name, value in seconds.items()]


def stage(norm_cfg: dict, bnet: int | str | None) -> nn.Module:
    """The stage with this norm everywhere, and BNET over it (or BNConv) at C."""
    from mmdet.models.backbones.resnet import Bottleneck  # after launch has mended what is broken
    from mmdet.models.layers import ResLayer

    net = ResLayer(Bottleneck, 256, 128, 4, stride=2, norm_cfg=norm_cfg)
    if bnet == 'BNConv':
        insert_bn_conv(net, k=3, where='C')
    elif norm_cfg['type'] == 'BNET':
        for block in net:
            block.bn3 = type(block.bn3)(512, k=bnet, norm=norm_cfg['norm'])
    elif bnet:
        enhance(net, k=bnet, where='C')
    return net.train()


def step(net: nn.Module, x: torch.Tensor) -> None:
    net.zero_grad()
    net(x).square().mean().backward()


def interleaved(candidates: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each; two rounds to warm up (and to fill histories), then ``runs`` rounds of one call each."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(runs + 2):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
        print(f'\rround {number + 1} of {runs + 2}', end='', file=sys.stderr)
    print(file=sys.stderr)
    return {name: statistics.median(values) for name, values in seconds.items()}


def saved_bytes(net: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without parameters and buffers."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [*net.parameters(), *net.buffers()]}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = net(x)
    total = sum(storages.values())
    del y
    return total


def statistics_bytes(net: nn.Module) -> int:
    """Bytes of running statistics and histories (what the state dict has beside parameters), when these are full."""
    x = torch.randn(2, 256, 14, 14, requires_grad=True)
    for _ in range(4):
        step(net, x)
    parameters = {name for name, _ in net.named_parameters()}
    tensors = [value for name, value in net.state_dict().items() if name not in parameters]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write(path: Path, what: str, rows: list[tuple[str, str, float, str]], runs: int) -> None:
    """Print the rows and append them to the CSV file."""
    bn = {quantity: value for name, quantity, value, _ in rows if name == 'BN'}
    device = f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads'
    fixed = (datetime.date.today().isoformat(), device, torch.__version__, what)
    new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for name, quantity, value, unit in rows:
            ratio = value / bn[quantity]
            print(f'{quantity:20} {name:30} {value:9.1f} {unit:4} {ratio:6.2f} x BN')
            writer.writerow((*fixed, name, quantity, f'{value:.3f}', unit, f'{ratio:.3f}', runs))
    print(f'appended {len(rows)} rows to {path}')
    if not torch.cuda.is_available():
        print('not measured: anything on a GPU (none here)')


if __name__ == '__main__':
    run_tool(main)
