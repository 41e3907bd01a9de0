"""The config for a user's own data: the text of one that inherits from another."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from yapf.yapflib.yapf_api import FormatCode

from bnet_mm.cli import UserError
from bnet_mm.surgery.config import call_text, dicts_in

STEPS = 5000  # of the optimizer, at least
EPOCHS = 100  # of a config that counts iterations, at most where these are more steps
DATA_SETS = {'mmdet': 'CocoDataset', 'mmseg': 'BaseSegDataset'}
STYLE = dict(based_on_style='pep8', column_limit=120, dedent_closing_brackets=True, split_before_first_argument=True)


class Expression(str):
    """Python in the text of a config, where a string would have quotes."""

    __repr__ = str.__str__


def takes(cfg: Config) -> str:
    """What the models of a config learn from: 'boxes', 'objects' (boxes with masks) or 'masks'.

    Raises:
        UserError: For other models than detectors and segmentors.
    """
    scope = cfg.get('default_scope')
    if scope not in DATA_SETS:
        raise UserError(
            f'the config is for {scope or "no library"}; data are prepared for detectors (mmdet) and segmentors (mmseg)'
        )
    if scope == 'mmseg':
        return 'masks'
    return 'objects' if any(node.get('with_mask') for _, node in dicts_in(cfg.train_dataloader)) else 'boxes'


def config_for(cfg: Config, root: Path, data: Path, classes: list[str], images: Mapping[str, int]) -> dict[str, Any]:
    """What the new config changes: data, classes, batch size, schedule; the first of it are variables for the rest.

    Args:
        cfg: The config that it inherits from.
        root: Folder of the images.
        data: Folder of the annotation files, see output.py.
        classes: Names.
        images: Split -> number of images.
    """
    scope = cfg.default_scope
    result: dict[str, Any] = dict(classes=tuple(classes), data_root=f'{root}/', ann_root=f'{data}/')
    result['model'] = with_classes(cfg.model.to_dict(), len(classes))
    for part, split in (('train', 'train'), ('val', 'val'), ('test', 'test' if 'test' in images else 'val')):
        loader = cfg[f'{part}_dataloader']
        ann_file = Expression(f"ann_root + '{split}.{'json' if scope == 'mmdet' else 'txt'}'")
        dataset: dict[str, Any] = dict(
            type=DATA_SETS[scope], data_root=Expression('data_root'), ann_file=ann_file,
            metainfo=dict(classes=Expression('classes')),
        )  # fmt: skip
        if scope == 'mmdet':
            dataset['data_prefix'] = dict(img='')
        else:
            dataset.update(img_suffix='', seg_map_suffix='.png')
            dataset['data_prefix'] = dict(img_path='', seg_map_path=Expression("ann_root + 'masks'"))
        result[f'{part}_dataloader'] = dict(dataset=over(loader['dataset'], dataset))
        if part == 'train':
            result['train_dataloader']['batch_size'] = min(loader['batch_size'], images['train'])
        elif scope == 'mmdet':
            evaluator = dict(type='CocoMetric', ann_file=ann_file)
            result[f'{part}_evaluator'] = over(cfg[f'{part}_evaluator'], evaluator)
    batch = result['train_dataloader']['batch_size']
    result.update(schedule(cfg, math.ceil(images['train'] / batch)))
    if cfg.get('auto_scale_lr', {}).get('base_batch_size'):
        result['auto_scale_lr'] = dict(enable=True)
    return result


def over(base: Any, new: dict[str, Any]) -> dict[str, Any]:
    """``new`` as a change of ``base``, or, where they are of other kinds, in its place with its pipeline."""
    if isinstance(base, dict) and (base.get('type') == new['type'] or 'pipeline' in base):
        if 'metainfo' in base:  # its palette is for other classes
            new['metainfo']['_delete_'] = True
        return new
    pipeline = next((node['pipeline'] for _, node in dicts_in(base) if 'pipeline' in node), None)
    return dict(_delete_=True, **new, **(dict(pipeline=pipeline) if pipeline else {}))


def with_classes(node: Any, count: int) -> Any:
    """The part of a model's config that changes with the number of classes; lists, which do not merge, as a whole."""
    if isinstance(node, (list, tuple)):
        changed = copy.deepcopy(node)
        heads = [child for _, child in dicts_in(changed) if 'num_classes' in child]
        for child in heads:
            child['num_classes'] = count
        return changed if heads else None
    if not isinstance(node, dict):
        return None
    result = {key: change for key, child in node.items() if (change := with_classes(child, count))}
    return dict(result, num_classes=count) if 'num_classes' in node else result


def schedule(cfg: Config, steps: int) -> dict[str, Any]:
    """Length of the training and of what depends on it.

    A config that counts epochs gets as many more as make STEPS steps, one that counts iterations gets EPOCHS epochs,
    but no more iterations than it has and no fewer than STEPS.

    Args:
        steps: Of the optimizer in an epoch.
    """
    loop = cfg.train_cfg
    by_epoch = 'max_iters' not in loop
    old = loop['max_epochs'] if by_epoch else loop['max_iters']
    new = max(old, math.ceil(STEPS / steps)) if by_epoch else min(old, max(STEPS, EPOCHS * steps))
    if new == old:
        return {}

    def scaled(value: Any) -> Any:
        return [scaled(one) for one in value] if isinstance(value, (list, tuple)) else max(1, round(value * new / old))

    def stretched(scheduler: dict) -> dict:
        lengths = ('begin', 'end', 'milestones', 'T_max') if scheduler.get('by_epoch', True) == by_epoch else ()
        known = {key: value for key, value in scheduler.items() if key != '_scope_'}
        return {key: scaled(value) if key in lengths and value else value for key, value in known.items()}

    result: dict[str, Any] = dict(train_cfg={'max_epochs' if by_epoch else 'max_iters': new})
    if 'val_interval' in loop:
        result['train_cfg']['val_interval'] = scaled(loop['val_interval'])
    interval = cfg.get('default_hooks', {}).get('checkpoint', {}).get('interval', -1)
    if interval > 0:
        result['default_hooks'] = dict(checkpoint=dict(interval=scaled(interval)))
    given = cfg.get('param_scheduler') or []
    result['param_scheduler'] = [stretched(one) for one in (given if isinstance(given, list) else [given])]
    return result


def config_text(title: str, base: str, change: dict[str, Any]) -> str:
    """The file: a comment, ``_base_`` and the changes."""
    lines = [f'# {title}', f'_base_ = {base!r}', *(f'{name} = {call_text(value)}' for name, value in change.items())]
    return FormatCode('\n'.join(lines), style_config=STYLE)[0]
