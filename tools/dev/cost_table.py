"""Parameters and FLOPs, printed and counted: python tools/dev/cost_table.py [--table N] [--format FORMAT] [--check]

configs/costs.json has the rows of the paper's Tables 1, 2, 3, 5, 8, 9, 10, 11 and 13: the printed figures, the config
that is the row's model here, and the rule (RULES below) by which its FLOPs are counted. Parameters are the trainable
ones of the whole model. Nothing is computed: the models are on torch's meta device.

The rule is mmcv's counter wherever that meets the print. Its successor, mmengine's FlopAnalyzer, has the same
multiply-adds, but leaves out biases, activations and max pooling: it has 206.8 for the printed 207.1 of Faster R-CNN
(Table 5), 354.8 for the 354.4 of PSPNet (Table 1) and 4.24 for the 4.3 of BNET-5 (Table 9).

--check fails if a figure, rounded to the printed digits, is not the printed one. EXCEPTIONS are those that are known
not to be, with the figure that is counted instead; --check fails as well if that one changes.
"""

from __future__ import annotations

import checkout  # noqa: F401  (first: is this the right Python?)

# isort: split

import argparse
import functools
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

import torch
from torch import Tensor, nn

from bnet_mm.cli import UserError, load_config, run_tool
from bnet_mm.engine.runner import build_model
from bnet_mm.layers.bnet import DepthwiseTransform
from bnet_mm.layers.normalisers import AffineFreeBatchNorm2d

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
LIBRARIES = {
    'classification': 'mmpretrain', 'detection': 'mmdet', 'segmentation': 'mmseg', 'action recognition': 'mmaction',
}  # fmt: skip
FIGURES = {  # key in costs.json: name, unit, digits that are printed, digits that are shown here
    'params_m': ('#Params, M', 1e6, 1, 3), 'gflops': ('GFLOPs', 1e9, 1, 3), 'mflops': ('MFLOPs', 1e6, 0, 1),
}  # fmt: skip
RULES = {
    'mmcv': (
        "mmcv's counter (mmcv.cnn.get_model_complexity_info), as mmdetection 2.x called it: multiply-adds of "
        'convolutions and linear layers, 1 for each bias of a convolution, 2 per element of a BN (1 without scale and '
        'shift), 1 of an activation and of what is pooled; modules only, so neither functions nor SyncBN. BNET is a BN '
        'without scale and shift and a convolution with bias. Detectors with 1000 proposals, segmentors without '
        'auxiliary head.'
    ),
    'multiply-adds': (
        'multiply-adds of convolutions, BNET and linear layers, those of binary convolutions / 64; cut off to whole '
        'millions, as the six MobileNetV2 rows are printed (rounding would print 301, 331 and 114).'
    ),
}
TSN = (
    'the steps between the rows are met, but all are 0.2 higher than every other ResNet-50 of the paper; no usual '
    'input size explains it, nor would a deep stem (4.36)'
)
BIREAL = (
    'neither depth nor place is printed. 18 layers have 164.0 M (163 in the Bi-Real paper). No place in the block adds '
    'the printed 11 M: all 16 binary convolutions add 13.5 M, the last one of each block 6.8 M'
)
EXCEPTIONS = {  # table, row, figure: what is counted, in the printed digits, and why it differs
    (1, 7, 'gflops'): (4.1, TSN),
    (1, 8, 'gflops'): (4.2, TSN),
    (8, 1, 'gflops'): (4.1, TSN),
    (8, 2, 'gflops'): (4.2, TSN),
    (8, 3, 'gflops'): (4.3, TSN),
    (3, 2, 'params_m'): (3.6, 'the figure of BN is printed again; BNET-3 adds 0.057 M to its 3.505 M'),
    (3, 7, 'mflops'): (163, BIREAL),
    (3, 8, 'mflops'): (177, BIREAL),
    (5, 9, 'gflops'): (
        291.4,
        'all other BNET-5 detectors add 25 per element to their BN row, this one 26 (291.62), which would be a BN that '
        'keeps a frozen scale and shift',
    ),
    (13, 2, 'gflops'): (319.9, '0.004 short: 319.946 are counted, while the BN row and the rule of Table 5 are met'),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', type=int, metavar='N', help='only this table of the paper')
    parser.add_argument('--format', choices=['text', 'markdown', 'json'], default='text', help='of the output (text)')
    parser.add_argument('--check', action='store_true', help='fail if a printed figure is not met')
    args = parser.parse_args()
    rows = [compare(row) for row in printed_rows(args.table)]
    print(json.dumps(rows, indent=1) if args.format == 'json' else '\n'.join(page(rows, args.format == 'markdown')))
    if args.check:
        print(check(rows), file=sys.stderr)


def printed_rows(table: int | None = None) -> list[dict]:
    """The rows of configs/costs.json, of one table or of all."""
    rows = json.loads((CONFIGS / 'costs.json').read_text())
    known = sorted({row['table'] for row in rows})
    if table is not None and table not in known:
        raise UserError(f'--table {table}: the tables with costs are {", ".join(map(str, known))}')
    return [row for row in rows if table in (None, row['table'])]


def compare(row: dict) -> dict:
    """The row with ``counted`` and ``verdict`` of each figure: met, NOT MET, excepted: why, or not counted: why."""
    figures = [figure for figure in FIGURES if figure in row]
    try:
        parameters, flops = count_config(row['config'], row['task'], tuple(row['input']), row['rule'])
    except ImportError as error:
        reason = f'not counted: {LIBRARIES[row["task"]]} cannot be imported ({error})'
        return {**row, 'counted': dict.fromkeys(figures), 'verdict': dict.fromkeys(figures, reason)}
    counted, verdict = {}, {}
    for figure in figures:
        _, unit, printed_digits, digits = FIGURES[figure]
        value = (parameters if figure == 'params_m' else flops) / unit
        as_printed = int(value) if figure == 'mflops' else round(value, printed_digits)
        expected, reason = EXCEPTIONS.get((row['table'], row['row'], figure), (row[figure], ''))
        counted[figure] = round(value, digits)
        verdict[figure] = 'NOT MET' if as_printed != expected else f'excepted: {reason}' if reason else 'met'
    return {**row, 'counted': counted, 'verdict': verdict}


@functools.cache
def count_config(config: str, task: str, size: tuple[int, int], rule: str) -> tuple[int, float]:
    """Trainable parameters and FLOPs of the model of a config.

    Raises:
        ImportError: If the library of the task, or mmcv, cannot be imported.
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            for name in (f'{LIBRARIES[task]}.models', 'mmcv.cnn.utils.flops_counter'):
                importlib.import_module(name)
            args = argparse.Namespace(
                config=str(CONFIGS / config), cfg_options={}, work_dir=None, launcher='none', local_rank=0
            )
            model = build_model(load_config(args))
    finally:
        logging.disable(logging.NOTSET)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), count_flops(model, task, size, rule)


@torch.no_grad()
def count_flops(model: nn.Module, task: str, size: tuple[int, int], rule: str) -> float:
    """FLOPs of one image of (height, width) by one of RULES. The model is moved to the meta device."""
    count, counts = mmcv_count if rule == 'mmcv' else multiply_adds, []
    hooks = [m.register_forward_hook(lambda *call: counts.append(count(*call))) for m in model.modules()]
    forward(model.to('meta').eval(), torch.empty(1, 3, *size, device='meta'), task)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def forward(model: nn.Module, image: Tensor, task: str) -> None:
    """What OpenMMLab's tools of 2020 ran (``forward_dummy``)."""
    if task == 'classification':
        model(image)
    elif task == 'action recognition':
        model(image[None], stage='head')
    elif task == 'segmentation':
        model.decode_head(model.extract_feat(image))
    elif hasattr(model, 'roi_head'):
        model.rpn_head(model.extract_feat(image))
        extractor = model.roi_head.bbox_roi_extractor
        model.roi_head.bbox_head(image.new_empty(1000, extractor.out_channels, *extractor.roi_layers[0].output_size))
    else:
        model.bbox_head(model.extract_feat(image))


def multiply_adds(module: nn.Module, _: tuple, output: Tensor) -> float:
    if not isinstance(module, (nn.Conv2d, nn.Linear, DepthwiseTransform)):
        return 0
    share = 64 if type(module).__name__ == 'BinaryConv2d' else 1  # not imported, because that needs mmpretrain
    return output.numel() * module.weight[0].numel() / share


def mmcv_count(module: nn.Module, inputs: tuple, output: Tensor) -> float:
    """What mmcv counts for the types of modules that it knows, subclasses excluded, and for the two parts of BNET."""
    from mmcv.cnn.utils.flops_counter import get_modules_mapping

    if isinstance(module, DepthwiseTransform):
        return multiply_adds(module, inputs, output) + output.numel()
    kind = nn.BatchNorm2d if type(module) is AffineFreeBatchNorm2d else type(module)
    module.__flops__ = 0  # mmcv's functions add to it
    get_modules_mapping().get(kind, lambda *_: None)(module, inputs, output)
    return module.__dict__.pop('__flops__')


def page(rows: list[dict], markdown: bool) -> Iterator[str]:
    """The lines of the output: every table, then the rules and the notes."""
    notes = list(dict.fromkeys(verdict for row in rows for verdict in row['verdict'].values() if ': ' in verdict))
    for table in dict.fromkeys(row['table'] for row in rows):
        own = [row for row in rows if row['table'] == table]
        figures = [figure for figure in FIGURES if any(figure in row for row in own)]
        grid = [['row', *(cell for figure in figures for cell in (f'printed {FIGURES[figure][0]}', 'counted')), 'rule']]
        grid += [
            [row['label'], *(cell for figure in figures for cell in cells(row, figure, notes)), row['rule']]
            for row in own
        ]
        widths = [max(map(len, column)) for column in zip(*grid)]
        if markdown:
            grid.insert(1, ['-' * width for width in widths])
        yield f'**Table {table}**\n' if markdown else f'Table {table}'
        for line in grid:
            line = [cell.ljust(width) for cell, width in zip(line, widths)]
            yield f'| {" | ".join(line)} |' if markdown else '  '.join(line)
        yield ''
    legend = [f'{name}: {RULES[name]}' for name in dict.fromkeys(row['rule'] for row in rows)]
    for text in [*legend, *(f'[{number}] {note}.' for number, note in enumerate(notes, 1))]:
        yield f'- {text}' if markdown else '\n'.join(wrap(text, 120, subsequent_indent='    '))


def cells(row: dict, figure: str, notes: list[str]) -> tuple[str, str]:
    """The printed and the counted figure, with its verdict unless it is met."""
    if figure not in row:
        return '-', '-'
    value, verdict = row['counted'][figure], row['verdict'][figure]
    text = 'not counted' if value is None else f'{value:.{FIGURES[figure][3]}f}'
    return str(row[figure]), text + (
        f' [{notes.index(verdict) + 1}]' if verdict in notes else '' if verdict == 'met' else f' {verdict}'
    )


def check(rows: list[dict]) -> str:
    """How many figures are met.

    Raises:
        UserError: If one is not met, or was not counted.
    """
    verdicts = [(row, figure, verdict) for row in rows for figure, verdict in row['verdict'].items()]
    problems = [
        f'Table {row["table"]}, {row["label"]}, {FIGURES[figure][0]}: {row[figure]} printed, '
        + (f'{row["counted"][figure]} counted' if verdict == 'NOT MET' else verdict)
        for row, figure, verdict in verdicts
        if verdict.startswith(('NOT MET', 'not counted'))
    ]
    if problems:
        raise UserError(f'{len(problems)} of {len(verdicts)} printed figures are not met: {"; ".join(problems)}')
    met = sum(verdict == 'met' for _, _, verdict in verdicts)
    return f'{len(verdicts)} printed figures: {met} are met, {len(verdicts) - met} are known exceptions'


if __name__ == '__main__':
    run_tool(main)
