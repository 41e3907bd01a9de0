"""Which errors a detector makes, by TIDE (paper, Table 14 and Figure 6; Bolya et al., arXiv 2008.08115)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pycocotools.coco import COCO

from bnet_mm.cli import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# TIDE's names and those of the paper.
MAIN = {'Cls': 'E_cls', 'Loc': 'E_loc', 'Both': 'E_both', 'Dupe': 'E_dupe', 'Bkg': 'E_bkg', 'Miss': 'E_miss'}
SPECIAL = {'FalsePos': 'E_FP', 'FalseNeg': 'E_FN'}


def tide_errors(truth: COCO, predictions: Mapping[str, list[dict]], masks: bool = False) -> dict[str, dict[str, float]]:
    """AP at IoU 0.5, and how much of it each kind of error costs, in percent, of several models.

    Args:
        predictions: In COCO's results format, by the name of the model.
        masks: Compare masks, not boxes.

    Raises:
        UserError: If the package tidecv is not installed.
    """
    try:
        import matplotlib
        import tidecv
        from tidecv.functions import toRLE
    except ImportError as error:
        raise UserError('error analysis needs the package tidecv; run: pip install tidecv') from error

    def data(name: str, annotations: list[dict]) -> tidecv.Data:
        collected = tidecv.Data(name, max_dets=100)
        for one in annotations:
            image, category = truth.imgs[one['image_id']], one['category_id']
            mask = toRLE(one['segmentation'], image['width'], image['height']) if masks else None
            shape = dict(box=one['bbox'], mask=mask)
            if 'score' in one:
                collected.add_detection(image['id'], category, one['score'], **shape)
            else:
                add = collected.add_ignore_region if one.get('iscrowd') else collected.add_ground_truth
                add(image['id'], category, **shape)
        return collected

    found = {}
    with matplotlib.rc_context():  # TIDE sets seaborn's style for the whole process
        tide = tidecv.TIDE(mode=tidecv.TIDE.MASK if masks else tidecv.TIDE.BOX)
        for name, detections in predictions.items():
            objects = data('ground truth', list(truth.anns.values()))  # TIDE writes its matches into them
            run = tide.evaluate(objects, data(name, detections), name=name)
            found[name] = {'AP_50': float(run.ap)}
    errors = tide.get_all_errors()
    for name, row in found.items():
        for kind, names in (('main', MAIN), ('special', SPECIAL)):
            row.update({ours: float(errors[kind][name][theirs]) for theirs, ours in names.items()})
    return found


def error_rows(errors: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A line of text for each model: its name and its errors, with the differences to the first model."""
    base = next(iter(errors.values()))
    lines = []
    for model, row in errors.items():
        cells = [f'{v:.1f}' if row is base else f'{v:.1f} ({v - base[name]:+.1f})' for name, v in row.items()]
        lines.append([model, *cells])
    return lines


def draw_errors(errors: Mapping[str, Mapping[str, float]]) -> Figure:
    """Each model's shares of the six kinds of error as a pie, and all errors of the models beside each other as bars.

    TIDE's own plots are of one model each, at 5,500 pixels, and not beside each other.
    """
    from matplotlib.figure import Figure

    names = list(MAIN.values())
    figure = Figure(figsize=(10, 6), layout='constrained')
    halves: Any = figure.subfigures(2, 1)
    above, below = halves
    for axis, (model, row) in zip(above.subplots(1, len(errors), squeeze=False)[0], errors.items()):
        values = [row[name] for name in names]
        axis.set_title(model, fontsize=9)
        if sum(values):
            labels = [name if value > 0.03 * sum(values) else '' for name, value in zip(names, values)]
            axis.pie(
                values, labels=labels, startangle=90, textprops=dict(fontsize=7), colors=[f'C{i}' for i in range(6)]
            )
    axis, bars = below.subplots(), [*names, *SPECIAL.values()]
    width = 0.8 / len(errors)
    for i, (model, row) in enumerate(errors.items()):
        places = [position + (i - (len(errors) - 1) / 2) * width for position in range(len(bars))]
        drawn = axis.bar(places, [row[name] for name in bars], width, label=model)
        axis.bar_label(drawn, fmt='%.1f', fontsize=6)
    axis.set_xticks(range(len(bars)), bars)
    axis.set_ylabel('AP at IoU 0.5 lost, %')
    axis.legend(fontsize=7)
    return figure
