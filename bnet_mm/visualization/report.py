"""What a page says of runs: its sections, from what the runs left on the disk (tools/report.py)."""

from __future__ import annotations

import importlib.util
import pickle
import statistics
from pathlib import Path
from typing import Any

import mmcv
from mmengine.registry import DATASETS, DefaultScope
from mmengine.utils import import_modules_from_strings

import bnet_mm
from bnet_mm.checkpoint.safe_load import load_checkpoint_file
from bnet_mm.cli import UserError, clear_errors
from bnet_mm.files import make_folder, written
from bnet_mm.surgery.config import dicts_in
from bnet_mm.visualization.confusion import confusion_matrix, draw_confusion
from bnet_mm.visualization.curves import draw_curves, write_csv
from bnet_mm.visualization.figures import save
from bnet_mm.visualization.page import Section, Table, compared, norm_of, revision, write_page
from bnet_mm.visualization.runs import Run
from bnet_mm.visualization.shown import CAPTION, Shown
from bnet_mm.visualization.strips import strip
from bnet_mm.visualization.taps import draw_taps, stage_shares, tap_layers

SIDE_BY_SIDE, HEATMAPS = 8, 3  # pictures
Groups = dict[str, list[Run]]


def build_report(groups: Groups, out: Path) -> Path:
    """Write the page of some recipes, each with its seeds; pictures are of the first seed.

    A part for which a run lacks something is replaced by a sentence that says what.

    Raises:
        UserError: For runs of different kinds, such as a classifier beside a detector.
    """
    kinds = {run.scope: name for name, runs in groups.items() for run in runs}
    if len(kinds) > 1:
        listed = ', '.join(f'{name} ({scope})' for scope, name in kinds.items())
        raise UserError(f'the runs are of different kinds, and no page compares them: {listed}')
    make_folder(out)
    first = {name: runs[0] for name, runs in groups.items()}
    errors, images = error_sections(first, out)
    maps, costs = map_section(first, images or first_images(next(iter(first.values()))), out)
    sections = [
        run_section(groups, costs), metric_section(groups), curve_section(groups, out), *errors, maps,
        tap_section(first, out), speed_section(groups),
    ]  # fmt: skip
    made = f'bnet_mm {bnet_mm.__version__}' + (f', git revision {revision()}' if revision() else '')
    return write_page(' and '.join(groups), sections, f'Page made with {made}.', out)


def run_section(groups: Groups, costs: dict[str, tuple[float, float]]) -> Section:
    """What was run, and with what."""
    rows = []
    for name, runs in groups.items():
        found, cost = runs[0].environment(), costs.get(name)
        seeds = ', '.join(str(run.seed if run.seed is not None else run.environment().get('seed', '?')) for run in runs)
        steps = [int(run.loss().steps[-1]) if len(run.loss().steps) else 0 for run in runs]
        rows.append([
            name, norm_of(runs[0].cfg), f'{cost[0]:#.3g}' if cost else '', f'{cost[1]:#.3g}' if cost else '', seeds,
            ', '.join(map(str, steps)), found.get('GPU 0', 'CPU' if found else ''), found.get('PyTorch', ''),
            found.get('MMEngine', ''), ', '.join(str(run.folder) for run in runs),
        ])  # fmt: skip
    columns = 'config, norm, parameters (M), GFLOPs, seeds, iterations, device, torch, mmengine, folder'
    note = 'Parameters are those that train; GFLOPs are multiply-adds of the whole model on the first image below.'
    return Section('What was run', [note], [Table('Runs', columns.split(', '), rows)])


def metric_section(groups: Groups) -> Section:
    """The metrics of the latest tests, with differences to the first recipe."""
    section = Section('Metrics', ['Of the latest test, or the last validation. Differences are to the first.'])
    names = list(dict.fromkeys(name for runs in groups.values() for run in runs for name in run.metrics()))
    values = {name: {group: _tested(runs, name) for group, runs in groups.items()} for name in names}
    rows = []
    for name, of_groups in values.items():
        reference = next(iter(of_groups.values()))
        cells = [compared(found, reference or found) if found else '' for found in of_groups.values()]
        rows.append([name, *cells])
    if rows:
        section.tables.append(Table('Mean, deviation and number of seeds', ['metric', *groups], rows))
        section.notes.append('An arrow: the difference is more than twice its standard error, which takes two seeds.')
    else:
        section.notes.append('Nothing was tested or validated yet.')
    return section


def _tested(runs: list[Run], name: str) -> list[float]:
    """pycocotools says -1 where there is nothing to find, such as no large object."""
    return [run.tested[name] for run in runs if run.tested.get(name, -1) != -1]


def curve_section(groups: Groups, out: Path) -> Section:
    section = Section('Training curves', files=['curves.svg', 'curves.csv'])
    runs = [run for group in groups.values() for run in group]
    if not any(len(run.loss().steps) for run in runs):
        return Section('Training curves', ['No loss was logged yet.'])
    validated = [name for name in runs[0].metrics() if len(runs[0].metric(name).steps)]
    metric = next(iter(validated), None)
    figure = draw_curves(groups, metric)
    save(figure, out / 'curves.svg')
    with written(out / 'curves.csv') as temporary:
        write_csv(groups, validated, temporary)
    section.add(
        figure, out, 'curves.png', f'Loss{f" and {metric}" if metric else ""} over iterations and hours of training'
    )
    return section


def error_sections(first: dict[str, Run], out: Path) -> tuple[list[Section], list[str]]:
    """Errors, precision-recall curves and detections side by side; and the images where the models differ most."""
    scope = next(iter(first.values())).scope
    if scope != 'mmdet':
        return [confusion_section(first, out)] if scope in ('mmpretrain', 'mmseg') else [], []
    section = Section('Errors')
    predictions = {name: run.predictions for name, run in first.items() if run.predictions}
    evaluators = dicts_in(next(iter(first.values())).cfg.to_dict().get('test_evaluator'))  # one, or several
    annotations = Path(next((node['ann_file'] for _, node in evaluators if node.get('ann_file')), ''))
    if not predictions or not annotations.is_file():
        lacks = f'the annotations {annotations} are not there' if predictions else 'no run has predictions'
        section.notes.append(f'Nothing to analyse: {lacks} (tools/test.py --out RUN/predictions.pkl writes them).')
        return [section], []
    from bnet_mm.visualization.detections import (
        draw_precision_recall,
        evaluated,
        matches,
        read_annotations,
        read_detections,
    )
    from bnet_mm.visualization.errors import draw_errors, error_rows, tide_errors
    from bnet_mm.visualization.side_by_side import SCORE, by_difference, draw_side_by_side

    truth, found, files = read_annotations(annotations), {}, {}
    for name, path in predictions.items():
        found[name], of_model = read_detections(path, truth)
        files.update(of_model)
    if importlib.util.find_spec('tidecv'):
        errors = tide_errors(truth, found)
        header = ['model', *next(iter(errors.values()))]
        caption = 'AP at IoU 0.5 and what errors cost of it, %, by TIDE'
        section.tables.append(Table(caption, header, error_rows(errors)))
        section.add(draw_errors(errors), out, 'errors.png', 'Shares of the errors, and what each costs')
    else:
        section.notes.append('Error analysis needs the package tidecv; run: pip install tidecv')
    evaluations = {name: evaluated(truth, detections) for name, detections in found.items()}
    section.add(
        draw_precision_recall(evaluations), out, 'precision_recall.png', 'Precision over recall, by size and class'
    )
    beside = Section('Detections side by side', ['The images where the models differ most come first.'])
    matched = {name: matches(evaluation, SCORE) for name, evaluation in evaluations.items()}
    there = [image for image, _ in by_difference(matched) if image in files and Path(files[image]).is_file()]
    for rank, image in enumerate(there[:SIDE_BY_SIDE], 1):
        figure = draw_side_by_side(evaluations, matched, image, mmcv.imread(files[image], channel_order='rgb'))
        alt = f'{Path(files[image]).name}: ground truth and the detections of {", ".join(evaluations)}'
        beside.add(figure, out, f'side_by_side_{rank}.png', alt)
    if not there:
        beside.notes = ['The images are not where tools/test.py found them.']
    return [section, beside], [files[image] for image in there[:HEATMAPS]]


def confusion_section(first: dict[str, Run], out: Path) -> Section:
    """Confusion matrices of classifiers, of segmentors by pixels."""
    section = Section('Confusion')
    for rank, (name, run) in enumerate(first.items(), 1):
        if run.predictions is None:
            section.notes.append(f'{name} has no predictions (tools/test.py --out RUN/predictions.pkl writes them).')
            continue
        with clear_errors(f'predictions {run.predictions} cannot be read'):
            matrix = confusion_matrix(pickle.loads(run.predictions.read_bytes()))
        figure = draw_confusion(matrix, class_names(run))
        section.add(figure, out, f'confusion_{rank}.png', f'{name}: true classes in rows, predicted ones in columns')
    return section


def class_names(run: Run) -> list[str]:
    """Of the test data; none if it cannot be built."""
    data = test_data(run)
    return list(data.metainfo.get('classes') or []) if data else []


def test_data(run: Run) -> Any:
    """The data set of the run's test; None if its files are elsewhere."""
    try:
        with DefaultScope.overwrite_default_scope(run.scope):
            data = DATASETS.build(run.cfg.test_dataloader.dataset)
            len(data)  # reads the annotations of a lazy one
            return data
    except Exception:  # whatever a data set raises whose files are elsewhere: the page does without
        return None


def first_images(run: Run) -> list[str]:
    """The first files of the run's test data; none if they cannot be found."""
    data = test_data(run)
    found = [data.get_data_info(i) for i in range(min(HEATMAPS, len(data)))] if data else []
    return [path for one in found if (path := one.get('img_path') or one.get('filename')) and Path(path).is_file()]


def map_section(first: dict[str, Run], images: list[str], out: Path) -> tuple[Section, dict[str, tuple[float, float]]]:
    """Strips of maps over some images; and parameters and GFLOPs of the models."""
    section, shown, costs = Section('Enhancement and attention'), [], {}
    for name, run in first.items():
        try:
            import_modules_from_strings(**(run.cfg.get('custom_imports') or dict(imports=[])))
            if run.checkpoint is None:
                raise UserError(f'{run.folder} has no checkpoint')
            shown.append(Shown(name, run.cfg, str(run.checkpoint), []))
        except UserError as error:
            section.notes.append(f'No maps of {name}: {error}.')
    for model in shown if images else ():
        costs[model.name] = model.cost(images[0])
    for rank, image in enumerate(images if shown else (), 1):
        figure = strip([row for model in shown for row in model.rows(image)], CAPTION)
        section.add(
            figure, out, f'maps_{rank}.png', f'{Path(image).name}: what BNET enhances and where the models look'
        )
    if not images:
        section.notes.append('No maps: the test images were not found.')
    return section, costs


def tap_section(first: dict[str, Run], out: Path) -> Section:
    section, shares = Section('What the taps learned'), {}
    for rank, (name, run) in enumerate(first.items(), 1):
        if run.checkpoint is None:
            continue
        checkpoint = load_checkpoint_file(str(run.checkpoint), map_location='cpu')
        layers = tap_layers(checkpoint.get('state_dict', checkpoint))
        if layers:
            shares[name] = stage_shares(layers)
            section.add(draw_taps(layers), out, f'taps_{rank}.png', f'{name}: the most changed channels of each layer')
    if shares:
        stages = list(dict.fromkeys(stage for of_model in shares.values() for stage in of_model))
        rows = [[stage, *(f'{100 * s[stage]:.1f}' if stage in s else '' for s in shares.values())] for stage in stages]
        section.tables.append(Table('Share of tap energy off the centre, % (0 in BN)', ['stage', *shares], rows))
    else:
        section.notes.append('No checkpoint with taps.')
    return section


def speed_section(groups: Groups) -> Section:
    """As mmengine logged it."""
    rows = []
    for name, runs in groups.items():
        lines = [line for run in runs for line in run.scalars if 'loss' in line]
        times = [line['time'] for line in lines if 'time' in line]
        memory = [line['memory'] for line in lines if 'memory' in line]
        tested = _tested(runs, 'time')
        rows.append([
            name, f'{statistics.median(times):.3f}' if times else '', f'{max(memory)}' if memory else 'not logged',
            f'{statistics.fmean(tested):.3f}' if tested else '',
        ])  # fmt: skip
    header = ['config', 'training, s per iteration', 'memory, MB', 'test, s per iteration']
    return Section('Speed and memory', ['As logged; other work on the machine counts.'], [Table('Speed', header, rows)])
