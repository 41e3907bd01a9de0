"""Figures of a GPU and what they have to be, for gpu_acceptance.sh: python tools/dev/gpu_figures.py FOLDER

Times by the GPU's events with a cold L2 (triton.testing.do_bench); host time is that of calls on a map so small that
the GPU waits for them; launches are those that the profiler sees. BN is measured beside everything. Writes rows to
FOLDER/gpu.csv and FOLDER/verdict.json. Without a GPU the same calls run once on small maps, on executed PTX: launches
are counted, nothing is timed.
"""

from __future__ import annotations

import checkout  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch
from torch import nn

from benchmark import Row, evaluate, forward_backward, layer, peak_memory, resnet, saved_bytes, train_step, write
from bnet_mm.cli import UserError, run_tool
from bnet_mm.files import written
from helpers.gpu import CUDA, DEVICE, DTYPES, LAYOUTS, gpu_or_stand_in

MAPS = ((16, 256, 200, 336), (32, 256, 56, 56), (64, 1024, 14, 14), (64, 2048, 7, 7)) if CUDA else ((2, 4, 6, 14),)
LARGE = MAPS[0]
SIZES = (3, 5, 7) if CUDA else (3,)
Call = Callable[[], object]


class Goal(NamedTuple):
    """A figure, the most that it may be, and whether it is not more; None where it was not measured."""

    name: str
    bar: float
    figure: float | None

    @property
    def met(self) -> bool | None:
        return None if self.figure is None else self.figure <= self.bar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, help='folder for the figures, with tests.xml of tests/gpu')
    folder = parser.parse_args().folder
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder')
    goals = [*tests(folder), *sanitizers(folder)]
    with gpu_or_stand_in() as machine:
        for title, part in (
            ('launches', launches(machine)),
            ('host', host_time()),
            ('layer', layers()),
            ('net', nets()),
        ):
            rows: list[Row] = []
            for item in part:
                (goals if isinstance(item, Goal) else rows).append(item)
            if CUDA and rows:
                write(folder / 'gpu.csv', title, rows, 1)
    verdict = dict(
        device=torch.cuda.get_device_name() if CUDA else 'none: executed PTX, nothing timed', torch=torch.__version__,
        met=all(goal.met is not False for goal in goals), goals=[dict(goal._asdict(), met=goal.met) for goal in goals],
    )  # fmt: skip
    with written(folder / 'verdict.json') as temporary:
        temporary.write_text(json.dumps(verdict, indent=1))
    for goal in goals:
        word = {None: 'not measured', True: 'met', False: 'MISSED'}[goal.met]
        figure = '' if goal.figure is None else f'{goal.figure:.3g}'
        print(f'{"" if CUDA else "rehearsal: "}{goal.name:60} {figure:>9} (at most {goal.bar:g})  {word}')
    sys.exit(0 if verdict['met'] else 1)


def tests(folder: Path) -> Iterator[Goal]:
    report = folder / 'tests.xml'
    suite = ElementTree.parse(report).find('testsuite') if report.exists() else None
    failed = None if suite is None else float(int(suite.get('failures', 0)) + int(suite.get('errors', 0)))
    yield Goal('failed tests of tests/gpu', 0, failed)


def sanitizers(folder: Path) -> Iterator[Goal]:
    for tool, line in (('memcheck', r'ERROR SUMMARY: (\d+)'), ('racecheck', r'RACECHECK SUMMARY: (\d+)')):
        log = folder / f'{tool}.log'
        found = re.findall(line, log.read_text()) if log.exists() else []
        yield Goal(f'compute-sanitizer {tool}, errors', 0, float(sum(map(int, found))) if found else None)


def modes(x: torch.Tensor, k: int | None) -> dict[str, Call]:
    """The calls of a layer: evaluation, and a training step with frozen and with batch statistics."""
    grad, needs_grad = torch.randn_like(x), x.detach().requires_grad_()
    return {
        'evaluation': evaluate(layer(k, x).eval(), x),
        'frozen statistics, forward + backward': forward_backward(layer(k, x).eval(), needs_grad, grad),
        'batch statistics, forward + backward': forward_backward(layer(k, x).train(), needs_grad, grad),
    }


def launches(machine: Any) -> Iterator[Goal]:
    """Kernels of a call; one of those in training counts the batches, which BN launches too."""
    x = torch.randn(2, 8, 12, 16, device=DEVICE)
    for (mode, call), bar in zip(modes(x, 3).items(), (1, 1 + 2, 3 + 3 + 1)):
        call()
        if CUDA:
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                call()
                torch.cuda.synchronize()
            number = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
        else:
            before = len(machine.launches)
            call()
            number = len(machine.launches) - before
        yield Goal(f'launches, k=3, {mode}', bar, number)


def host_time() -> Iterator[Goal | Row]:
    """Microseconds of the host for a call."""
    x = torch.randn(2, 64, 8, 8, device=DEVICE) if CUDA else torch.randn(1, 2, 3, 4)
    for mode, bar in zip(modes(x, None), (1.0, 1.2, 1.2)):
        seconds = {k: host_seconds(modes(x, k)[mode]) for k in (None, 3)}
        for k, value in seconds.items():
            yield ('BN' if k is None else f'BNET-{k}', f'host time, {mode}', value * 1e6, 'us')
        yield Goal(f'host time, k=3, {mode}, ratio to BN', bar, measured(seconds[3] / seconds[None]))


def layers() -> Iterator[Goal | Row]:
    """Every map, dtype and layout."""
    bars = {
        ('evaluation', 'float32'): (1.0, 1.0, 1.1), ('evaluation', 'float16'): (1.0, 1.2, 1.8),
        ('batch statistics, forward + backward', 'float32'): (1.12, 1.2, 1.4),
    }  # fmt: skip
    for shape, (kind, dtype), (layout, memory_format) in itertools.product(MAPS, DTYPES.items(), LAYOUTS.items()):
        x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=memory_format)
        seconds = {(k, mode): gpu_seconds(call) for k in (None, *SIZES) for mode, call in modes(x, k).items()}
        for (k, mode), value in seconds.items():
            quantity = f'{mode} {kind} {layout} {shape}'
            yield ('BN' if k is None else f'BNET-{k}', quantity, value * 1e3, 'ms')
            if k and shape == LARGE and (mode, kind) in bars:
                bar = bars[mode, kind][SIZES.index(k)]
                yield Goal(f'{quantity}, k={k}, ratio to BN', bar, measured(value / seconds[None, mode]))
    x = torch.randn(LARGE, device=DEVICE, requires_grad=True)
    kept = {k: saved_bytes(layer(k, x), x) for k in (None, 3)}
    yield Goal('bytes kept for backward, k=3, ratio to BN', 1.01, kept[3] / kept[None] if CUDA else None)


def nets() -> Iterator[Row]:
    """ResNet-50: inference, training steps in float32 and under autocast, peak memory."""
    side, batch = (224, 64) if CUDA else (32, 2)
    image, images = (
        torch.randn(1, 3, 4 * side, 6 * side, device=DEVICE),
        torch.randn(batch, 3, side, side, device=DEVICE),
    )
    for k in (None, 1, *SIZES) if CUDA else (3,):
        net, name = resnet(k), 'BN' if k is None else f'BNET-{k}'
        if CUDA:
            yield (name, f'inference {tuple(image.shape)}', gpu_seconds(evaluate(net.eval(), image)) * 1e3, 'ms')
        for amp in (False, True):
            step = autocast_step(net.train(), images, amp)
            quantity = f'training step {tuple(images.shape)}{", autocast" if amp else ""}'
            yield (name, quantity, gpu_seconds(step) * 1e3, 'ms')
            if CUDA:
                yield (name, f'peak memory, {quantity}', peak_memory(step) / 2**20, 'MiB')


def autocast_step(net: nn.Module, x: torch.Tensor, enabled: bool) -> Call:
    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            train_step(net, x)

    return step


def gpu_seconds(call: Call) -> float:
    """Median of the GPU's time of a call, with a cold L2."""
    if not CUDA:
        call()
        return math.nan
    from triton.testing import do_bench

    return do_bench(call, warmup=20, rep=60, return_mode='median') * 1e-3


def host_seconds(call: Call) -> float:
    if not CUDA:
        call()
        return math.nan
    from torch.utils.benchmark import Timer

    with contextlib.redirect_stdout(sys.stderr):
        return Timer('call()', globals=dict(call=call)).blocked_autorange(min_run_time=0.5).median


def measured(ratio: float) -> float | None:
    return None if math.isnan(ratio) else ratio


if __name__ == '__main__':
    run_tool(main)
