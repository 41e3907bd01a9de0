"""Time and memory side by side: python tools/dev/benchmark.py {layer,backbone,detector,norms,runtimes} [--out DIR]

All candidates are built first and take turns, so that a busy machine slows them alike; medians and their ratios to BN
are printed, and appended as rows to DIR/<what>.csv with device, versions and date.
"""

from __future__ import annotations

from checkout import ROOT  # first: is this the right Python?

# isort: split

import argparse
import csv
import datetime
import functools
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from mmengine.config import Config
from torch import nn

from benchmark_tables import FUSED_BN, KERNEL_SIZES, write_readme
from bnet_mm.cli import UserError, run_tool
from bnet_mm.engine.export import Exported, export
from bnet_mm.engine.runner import build_model
from bnet_mm.layers import BNET
from bnet_mm.ops import backend_report
from bnet_mm.ops.dispatch import VARIABLE
from bnet_mm.surgery import enhance, fold
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
Row = tuple[str, str, float, str]  # name, quantity, value, unit
Name = TypeVar('Name')
Rows = Iterator[list[Row]]  # written as they come, so that a run that is stopped keeps what it has measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('what', choices=[*BENCHMARKS, 'readme'], help='; '.join(
        f'{name}: {function.__doc__.splitlines()[0]}' for name, function in BENCHMARKS.items()
    ) + '; readme: write the tables of bnet_mm/ops/README.md from the CSV files')  # fmt: skip
    parser.add_argument('--out', default='tools/dev/benchmark_results', help='folder of the CSV files (%(default)s)')
    parser.add_argument('--runs', type=int, default=15, help='repetitions of each candidate (15)')
    parser.add_argument('--check', action='store_true', help='readme: change nothing, fail if a table is stale')
    args = parser.parse_args()
    out = Path(args.out)
    if not out.is_dir():
        raise UserError(f'--out {args.out}: no such folder')
    if args.runs < 1:
        raise UserError(f'--runs takes a number above 0, got {args.runs}')
    if args.check and args.what != 'readme':
        raise UserError(f'--check goes with readme, not with {args.what}')
    if args.what == 'readme':
        write_readme(out, BENCHMARKS, args.check)
        return
    print(f'backends: {backend_report()}')
    for rows in BENCHMARKS[args.what](args.runs):
        write(out / f'{args.what}.csv', args.what, rows, args.runs)
    print('not measured: ' + ('CPU figures (hide the GPU)' if device() == 'cuda' else 'a GPU (none here), peak memory'))


def device() -> str:
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def candidates(make: Callable[[int | None], Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """BN, the paper's two operators one after the other, and this BNET, from ``make(k)``, k None for BN."""
    calls = {'BN': make(None)}
    for k in KERNEL_SIZES:
        bnet = make(k)
        calls[f'two operators, k={k}'] = with_backend('reference', bnet)
        calls[f'BNET-{k}'] = bnet
    return calls


def with_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
    """The same call with BNET_MM_BACKEND=name."""

    def run() -> object:
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = name
        try:
            return call()
        finally:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})

    return run


def timed(quantity: str, calls: dict[str, Callable[[], object]], runs: int) -> list[Row]:
    return [(name, quantity, value * 1e3, 'ms') for name, value in interleaved(calls, runs).items()]


def benchmark_layer(runs: int) -> Rows:
    """one layer: forward with frozen statistics, forward + backward with batch statistics, bytes kept for backward"""
    cuda = device() == 'cuda'
    inference = [(16, 256, 200, 336)] if cuda else resnet50_shapes(1, 800, 1333)
    training = [(16, 256, 200, 336), (64, 1024, 14, 14)] if cuda else resnet50_shapes(8, 224, 224)
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if cuda else (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix('torch.')
        for shape in inference:
            x = torch.randn(shape, device=device()).to(dtype)
            calls = candidates(lambda k, x=x: evaluate(layer(k, x).eval(), x))
            calls['copy'] = x.clone
            rows = timed(f'forward {kind} {shape}', calls, runs)
            if dtype == torch.float32:
                rows += roofline(f'forward {kind} {shape}', x, passes=2, products=1)
            yield rows
        for shape in training:
            x = torch.randn(shape, device=device()).to(dtype).requires_grad_()
            grad = torch.randn_like(x)
            calls = candidates(lambda k, x=x, grad=grad: forward_backward(layer(k, x), x, grad))
            rows = timed(f'forward + backward {kind} {shape}', calls, runs)
            if dtype == torch.float32:
                rows += roofline(f'forward + backward {kind} {shape}', x, passes=8, products=3)
            yield rows
        saved = candidates(lambda k, x=x: functools.partial(saved_bytes, layer(k, x), x))
        yield [(name, f'saved for backward {kind} {shape}', call() / 2**20, 'MiB') for name, call in saved.items()]


def resnet50_shapes(batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """The maps at C of ResNet-50's stages, for images of this size."""
    return [(batch, 256 << i, -(-height // (4 << i)), -(-width // (4 << i))) for i in range(4)]


def layer(k: int | None, x: torch.Tensor) -> nn.Module:
    """BatchNorm2d, or BNET-k with random taps, for x."""
    net = nn.BatchNorm2d(x.shape[1]) if k is None else BNET(x.shape[1], k=k)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net.to(x.device)


def evaluate(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: net(x))


def forward_backward(net: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(net(x), [x, *net.parameters()], grad)


def roofline(quantity: str, x: torch.Tensor, passes: int, products: int) -> list[Row]:
    """The least time that memory and arithmetic units of this machine need, for each k.

    ``passes``: how often a map is read or written; ``products``: multiply-adds per tap and pixel. Bandwidth is that of
    copying x, the rate of multiply-adds that of a matrix product.
    """
    square = torch.randn(2048, 2048, device=x.device)
    target = torch.empty_like(x, requires_grad=False)
    times = interleaved({'copy': lambda: target.copy_(x.detach()), 'product': lambda: square @ square}, 5)
    per_byte, per_product = times['copy'] / (2 * x.nbytes), times['product'] / 2048**3
    limits = {k: max(passes * x.nbytes * per_byte, products * k * k * x.numel() * per_product) for k in KERNEL_SIZES}
    print(f'memory {1e-9 / per_byte:.1f} GB/s, {1e-9 / per_product:.1f} G multiply-adds/s')
    return [(f'roofline, k={k}', quantity, value * 1e3, 'ms') for k, value in limits.items()]


def benchmark_backbone(runs: int) -> Rows:
    """ResNet-50 with BNET at C: inference of 800 x 1333, plain and folded; training steps of 8 x 224 x 224"""
    torch.manual_seed(0)
    nets = {k: resnet(k) for k in (None, 1, *KERNEL_SIZES)}

    def all_of(make: Callable[[int | None], Callable[[], object]]) -> dict[str, Callable[[], object]]:
        return candidates(make) | {FUSED_BN: make(1)}

    image, batch = torch.randn(1, 3, 800, 1333, device=device()), torch.randn(8, 3, 224, 224, device=device())
    for net in nets.values():
        net.eval()
    yield timed('inference 1x3x800x1333', all_of(lambda k: evaluate(nets[k], image)), runs)
    folded = {k: fold(net, inplace=False).model for k, net in nets.items()}
    calls = {name: evaluate(folded[k], image) for k, name in [(None, 'BN'), *((k, f'BNET-{k}') for k in KERNEL_SIZES)]}
    yield timed('inference, folded 1x3x800x1333', calls, runs)
    for statistics_of in ('batch', 'frozen'):
        for net in nets.values():
            net.train()
            if statistics_of == 'frozen':
                freeze_statistics(net)
        steps = all_of(lambda k: lambda: train_step(nets[k], batch))
        yield timed(f'training step, {statistics_of} statistics 8x3x224x224', steps, runs)
    kept = all_of(lambda k: lambda: saved_bytes(nets[k], batch))
    yield [(name, 'saved for backward 8x3x224x224', call() / 2**20, 'MiB') for name, call in kept.items()]
    if device() == 'cuda':
        peaks = all_of(lambda k: lambda: peak_memory(lambda: train_step(nets[k], batch)))
        yield [(name, 'peak memory 8x3x224x224', call() / 2**20, 'MiB') for name, call in peaks.items()]


def resnet(k: int | None) -> nn.Module:
    from torchvision.models import resnet50  # after bnet_mm has mended what is broken

    net = resnet50()
    if k:
        enhance(net, k=k, where='C')
    return with_random_taps(net).to(device())


def freeze_statistics(net: nn.Module) -> None:
    """What ``norm_eval=True``, mmdet's default, does."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def train_step(net: nn.Module, x: torch.Tensor) -> None:
    net.zero_grad()
    net(x).square().mean().backward()


def peak_memory(call: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated()


def benchmark_detector(runs: int) -> Rows:
    """Faster R-CNN R-50 of the paper: inference of one image of 800 x 1333"""
    from mmdet.structures import DetDataSample

    torch.manual_seed(0)
    detectors = {
        k: build_model(paper_config('faster_rcnn_r50', k, '1x')).to(device()).eval() for k in (None, *KERNEL_SIZES)
    }
    meta = dict(img_shape=(800, 1333), ori_shape=(800, 1333), scale_factor=(1.0, 1.0), pad_shape=(800, 1344))
    image = dict(inputs=torch.randn(1, 3, 800, 1344, device=device()), data_samples=[DetDataSample(metainfo=meta)])
    calls = candidates(lambda k: torch.no_grad()(lambda: detectors[k](**image, mode='predict')))
    yield timed('inference 1x3x800x1344', calls, runs)


def paper_config(model: str, k: int | None, schedule: str) -> Config:
    cfg = Config.fromfile(ROOT / 'configs' / f'{model}_{f"bnet{k}" if k else "bn"}_{schedule}.py')
    cfg.model.backbone.init_cfg = None
    return cfg


def with_random_taps(net: nn.Module) -> nn.Module:
    """Those of a new BNET are BN's."""
    for module in net.modules():
        if isinstance(module, BNET):
            nn.init.normal_(module.bnconv.weight, std=1 / module.bnconv.k)
    return net


def benchmark_runtimes(runs: int) -> Rows:
    """ResNet-50, folded, in torch, and its ONNX file in onnxruntime and OpenVINO: one image of 224 x 224"""
    torch.manual_seed(0)
    calls: dict[tuple[str, str], Callable[[], object]] = {}  # by runtime and norm; after each other: the same norm's
    with tempfile.TemporaryDirectory() as folder:
        for k in (None, *KERNEL_SIZES):
            model = with_random_taps(build_model(paper_config('resnet50', k, 'imagenet'))).eval()
            exported, path = Exported(fold(model, inplace=False).model), f'{folder}/{k}.onnx'
            export(exported, path, exported.axes(any_size=False), [224, 224])
            image = exported.image(1, 224, 224)
            for runtime, call in (('torch', evaluate(exported, image)), *in_runtimes(path, image).items()):
                calls[runtime, f'BNET-{k}' if k else 'BN'] = call
    seconds = interleaved(calls, runs)
    for runtime in dict.fromkeys(of for of, _ in calls):
        rows = [(name, value) for (of, name), value in seconds.items() if of == runtime]
        yield [(name, f'{runtime}, folded 1x3x224x224', value * 1e3, 'ms') for name, value in rows]


def in_runtimes(path: str, image: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Calls of an ONNX file with as many threads as torch has; OpenVINO's where it is installed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    calls: dict[str, Callable[[], object]] = {'onnxruntime': lambda: session.run(None, {'image': image.numpy()})}
    if importlib.util.find_spec('openvino'):
        import openvino

        settings = dict(INFERENCE_NUM_THREADS=torch.get_num_threads(), INFERENCE_PRECISION_HINT='f32')
        compiled = openvino.compile_model(path, 'CPU', settings)
        calls['OpenVINO'] = lambda: compiled([image.numpy()])
    return calls


def benchmark_norms(runs: int) -> Rows:
    """every norm in stage 2 of ResNet-50 (4 bottlenecks, 512 channels), on 8 maps of 256 x 56 x 56"""
    torch.manual_seed(0)
    x = torch.randn(8, 256, 56, 56, device=device(), requires_grad=True)
    stages = {name: stage(*options).to(device()) for name, options in NORMS.items()}
    yield [(name, 'saved for backward', saved_bytes(net, x) / 2**20, 'MiB') for name, net in stages.items()]
    yield [(name, 'statistics', statistics_bytes(net) / 2**20, 'MiB') for name, net in stages.items()]
    seconds = interleaved({name: lambda net=net: step(net, x) for name, net in stages.items()}, runs)
    yield [(name, 'training step', value * 1e3, 'ms') for name, value in seconds.items()]
    for net in stages.values():
        net.eval()
    with torch.no_grad():
        seconds = interleaved({name: lambda net=net: net(x) for name, net in stages.items()}, runs)
    yield [(name, 'inference', value * 1e3, 'ms') for name, value in seconds.items()]


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


def interleaved(candidates: dict[Name, Callable[[], object]], runs: int) -> dict[Name, float]:
    """Median seconds of each; two rounds to warm up (and to fill histories), then ``runs`` rounds of one call each.

    Before a short call there is one that does not count, so that nobody pays for the memory another gave back.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    for number in range(runs + 2):
        for name, call in candidates.items():
            if not seconds[name] or seconds[name][-1] < 0.5:
                call()
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
        print(f'\rround {number + 1} of {runs + 2}', end='', file=sys.stderr)
    print(file=sys.stderr)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    x = torch.randn(2, 256, 14, 14, device=device(), requires_grad=True)
    for _ in range(4):
        step(net, x)
    parameters = {name for name, _ in net.named_parameters()}
    tensors = [value for name, value in net.state_dict().items() if name not in parameters]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def write(path: Path, what: str, rows: list[Row], runs: int) -> None:
    """Print the rows and append them to the CSV file."""
    bn = {quantity: value for name, quantity, value, _ in rows if name == 'BN'}
    gpu = torch.cuda.is_available()
    kept = ', malloc keeps memory' if 'MALLOC_TRIM_THRESHOLD_' in os.environ else ''
    cpu = f'{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads{kept}'
    place = torch.cuda.get_device_name() if gpu else cpu
    fixed = (datetime.date.today().isoformat(), place, torch.__version__, what)
    new = not path.exists()
    with path.open('a', newline='') as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for name, quantity, value, unit in rows:
            ratio = value / bn[quantity]
            print(f'{quantity:45} {name:30} {value:9.1f} {unit:4} {ratio:6.2f} x BN')
            writer.writerow((*fixed, name, quantity, f'{value:.3f}', unit, f'{ratio:.3f}', runs))
    print(f'appended {len(rows)} rows to {path}')


BENCHMARKS = {
    'layer': benchmark_layer,
    'backbone': benchmark_backbone,
    'detector': benchmark_detector,
    'norms': benchmark_norms,
    'runtimes': benchmark_runtimes,
}

if __name__ == '__main__':
    run_tool(main)
