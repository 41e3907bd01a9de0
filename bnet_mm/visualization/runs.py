"""What a run left on the disk: work dirs of tools/train.py and tools/test.py, in mmengine's layout."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from bnet_mm.checkpoint.latest import NOTE, latest_checkpoint
from bnet_mm.cli import UserError, clear_errors

# Of a config, what says where and how it was run, not what; runs that agree in all else are seeds of one recipe.
NOT_THE_RECIPE = ('randomness', 'work_dir', 'load_from', 'resume', 'launcher', 'experiment_name', 'visualizer')
NOT_A_METRIC = ('step', 'time', 'data_time')
FIRST_METRICS = ('coco/bbox_mAP', 'coco/segm_mAP', 'mIoU', 'accuracy/top1', 'acc/top1')


@dataclass
class Curve:
    """Values over iterations; ``seconds`` is the time spent training until then."""

    steps: np.ndarray
    seconds: np.ndarray
    values: np.ndarray


@dataclass
class Run:
    """One training with what was tested of it.

    name: Of its config.
    folder: Where it was found; everything below belongs to it.
    cfg: The config as it was run.
    scalars: The lines of mmengine's LocalVisBackend of all parts of a resumed run, oldest first.
    tested: The metrics of the latest test; of the last validation where there was none.
    """

    name: str
    folder: Path
    cfg: Config
    scalars: list[dict[str, Any]] = field(default_factory=list)
    tested: dict[str, float] = field(default_factory=dict)

    @property
    def scope(self) -> str:
        return self.cfg.get('default_scope') or 'mmengine'

    @property
    def seed(self) -> int | None:
        return (self.cfg.get('randomness') or {}).get('seed')

    @property
    def checkpoint(self) -> Path | None:
        """The last one that was written."""
        notes = sorted(self.folder.rglob(NOTE), key=lambda path: path.stat().st_mtime, reverse=True)
        return next(filter(None, (latest_checkpoint(note.parent) for note in notes)), None)

    @property
    def predictions(self) -> Path | None:
        """The latest file of tools/test.py --out, if it lies in the folder."""
        return max(self.folder.rglob('*.pkl'), key=lambda path: path.stat().st_mtime, default=None)

    def environment(self) -> dict[str, str]:
        """What mmengine wrote at the top of the log: versions, device and seed; empty where there is no log."""
        logs = sorted(self.folder.rglob('[0-9]*_[0-9]*/*.log'), key=lambda path: path.stem)
        head = logs[-1].read_text(errors='replace')[:20000] if logs else ''
        found = re.findall(r'^ {4}(Python|PyTorch|GPU 0[^:]*|MMEngine|seed): ([^\n(]*)', head, re.MULTILINE)
        return {name.split(',')[0]: value.strip() for name, value in found}

    def recipe(self) -> dict:
        """The config without what differs between seeds."""
        return {key: value for key, value in self.cfg.to_dict().items() if key not in NOT_THE_RECIPE}

    def loss(self) -> Curve:
        """The logged loss; of iterations that a resumed run repeats, the last time counts, also in ``seconds``."""
        return self._over_iterations('loss')

    def learning_rate(self) -> Curve:
        """The logged learning rate."""
        return self._over_iterations('lr')

    def metric(self, name: str) -> Curve:
        """The validations; those of epochs stand at the last logged iteration of the epoch."""
        loss = self.loss()
        ends = {line['epoch']: line['step'] for line in self.scalars if 'loss' in line and 'epoch' in line}
        found = sorted({line['step']: line[name] for line in self.scalars if name in line}.items())
        steps = np.array([ends.get(step, step) for step, _ in found])
        seconds = np.interp(steps, loss.steps, loss.seconds) if len(loss.steps) else np.zeros(len(steps))
        return Curve(steps, seconds, np.array([value for _, value in found]))

    def metrics(self) -> list[str]:
        """Names of the metrics that were validated or tested, the most usual ones first."""
        validated = [line for line in self.scalars if is_validation(line)]
        names = dict.fromkeys(name for line in [*validated, self.tested] for name in line if name not in NOT_A_METRIC)
        return sorted(
            names, key=lambda name: FIRST_METRICS.index(name) if name in FIRST_METRICS else len(FIRST_METRICS)
        )

    def _over_iterations(self, name: str) -> Curve:
        lines = {line['step']: line for line in self.scalars if 'loss' in line and name in line}
        steps = np.array(sorted(lines))
        each = np.array([lines[step].get('time', 0.0) for step in sorted(lines)])
        seconds = np.cumsum(np.diff(steps, prepend=0) * each) if len(steps) else steps
        return Curve(steps, seconds, np.array([lines[step][name] for step in sorted(lines)]))


def is_validation(line: dict) -> bool:
    """Whether a line of scalars.json has metrics, not the loss or what a hook logs of the layers."""
    return 'loss' not in line and 'lr' not in line and not any(name.startswith('bnet/') for name in line)


def read_run(folder: Path) -> Run:
    """Everything that mmengine wrote below ``folder``: one training, its resumed parts, and tests of it.

    Raises:
        UserError: If there is nothing, or more than one config.
    """
    configs = sorted(folder.rglob('vis_data/config.py'), key=lambda path: path.parts[-3])
    if not configs:
        raise UserError(f'{folder} has no run of tools/train.py or tools/test.py')
    names = {path.stem for config in configs for path in config.parents[2].glob('*.py')}
    if len(names) > 1:
        raise UserError(f'{folder} has runs of several configs, {", ".join(sorted(names))}: name the folder of each')
    with clear_errors(f'a run below {folder} cannot be read'):
        files = sorted(folder.rglob('vis_data/scalars.json'), key=lambda path: path.parts[-3])
        scalars = [line for file in files for line in _lines(file)]
        trained = [file for file in configs if file.with_name('scalars.json').exists()]
        cfg = Config.fromfile((trained or configs)[-1], import_custom_modules=False)
    tests = sorted(
        (path for path in folder.rglob('*.json') if path.stem == path.parent.name), key=lambda path: path.stem
    )
    last = _lines(tests[-1]) if tests else [line for line in scalars if is_validation(line)]
    numbers = {name: value for name, value in (last or [{}])[-1].items() if isinstance(value, (int, float))}
    return Run(names.pop() if names else folder.name, folder, cfg, scalars, numbers)


def _lines(path: Path) -> list[dict]:
    """The complete lines of a file that may still be written to."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the last one of a run that was killed, or goes on
            continue
    return lines


def grouped(runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of each recipe, by a name: that of the config, with the folder's where another recipe has the same."""
    groups: list[list[Run]] = []
    for run in runs:
        same = next((group for group in groups if group[0].recipe() == run.recipe()), None)
        groups.append([run]) if same is None else same.append(run)
    names = [group[0].name for group in groups]
    labels = [name if names.count(name) == 1 else f'{name} ({group[0].folder})' for name, group in zip(names, groups)]
    return dict(zip(labels, groups))
