"""Reading of work dirs and the curves from them, on files written by hand in mmengine's layout."""

import csv
import json

import numpy as np
import pytest

from bnet_mm.cli import UserError
from bnet_mm.visualization.curves import draw_curves, lr_drops, mean_and_spread, write_csv
from bnet_mm.visualization.runs import Curve, grouped, read_run


def write_run(folder, lines, part='20260101_000000', name='some_config', seed=0, lr=0.1, tested=None):
    """One part of a training (and a test)."""
    place = folder / part / 'vis_data'
    place.mkdir(parents=True)
    config = f"model = dict(type='X', lr={lr})\nrandomness = dict(seed={seed})\nwork_dir = '{folder}'\n"
    config += "default_scope = 'mmdet'\n"
    (place / 'config.py').write_text(config)
    (folder / f'{name}.py').write_text(config)
    (place / 'scalars.json').write_text('\n'.join(json.dumps(line) for line in lines))
    if tested is not None:
        (folder / 'test' / '20270101_000000').mkdir(parents=True)
        (folder / 'test' / '20270101_000000' / '20270101_000000.json').write_text(json.dumps(tested))


def step(number, loss, epoch=None, time=2.0, lr=0.1):
    line = dict(lr=lr, loss=loss, time=time, step=number, iter=number)
    return line if epoch is None else dict(line, epoch=epoch)


def test_resumed_runs_are_joined(tmp_path):
    """The second part repeats iterations 20 and 30; the first one's last line is cut off."""
    first = [step(10, 5.0, 1), dict(mAP=0.1, step=1), step(20, 4.0, 2), step(30, 3.0, 3)]
    write_run(tmp_path, first)
    with open(tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json', 'a') as file:
        file.write('\n{"lr": 0.1, "lo')
    second = [step(20, 4.5, 2, time=1.0), dict(mAP=0.2, step=2), step(30, 3.5, 3, time=1.0), dict(mAP=0.3, step=3)]
    write_run(tmp_path, second, part='20260102_000000', tested=dict(mAP=0.31, time=1.0, what='x'))
    run = read_run(tmp_path)
    loss, metric = run.loss(), run.metric('mAP')
    assert loss.steps.tolist() == [10, 20, 30] and loss.values.tolist() == [5, 4.5, 3.5]
    assert loss.seconds.tolist() == [20, 30, 40]
    assert metric.steps.tolist() == [10, 20, 30] and metric.values.tolist() == [0.1, 0.2, 0.3]
    assert metric.seconds.tolist() == [20, 30, 40]
    assert run.name == 'some_config' and run.tested == dict(mAP=0.31, time=1.0) and run.metrics() == ['mAP']


def test_iterations_and_hook_lines(tmp_path):
    """A loop over iterations validates at iterations; NormStatisticsHook's lines are no validation."""
    lines = [step(10, 5.0), {'bnet/a/off_centre': 0.1, 'step': 10}, dict(mIoU=1.0, aAcc=2.0, step=12), step(20, 4.0)]
    write_run(tmp_path, lines)
    run = read_run(tmp_path)
    assert run.metric('mIoU').steps.tolist() == [12] and run.metric('mIoU').seconds.tolist() == [24]
    assert run.metrics() == ['mIoU', 'aAcc'] and run.tested['mIoU'] == 1
    write_run(tmp_path / 'new', [])  # a run that has not logged anything yet
    assert len(read_run(tmp_path / 'new').loss().steps) == 0


def test_seeds_of_a_recipe(tmp_path):
    for i, (seed, lr) in enumerate([(0, 0.1), (1, 0.1), (0, 0.2)]):
        write_run(tmp_path / str(i), [step(n, 10 * (i + 1) + n) for n in (1, 2, 3)], seed=seed, lr=lr)
    groups = grouped([read_run(tmp_path / str(i)) for i in range(3)])
    assert list(groups) == [f'some_config ({tmp_path / "0"})', f'some_config ({tmp_path / "2"})']
    pair = groups[f'some_config ({tmp_path / "0"})']
    assert [run.seed for run in pair] == [0, 1]
    grid, mean, spread = mean_and_spread([run.loss() for run in pair], 'steps')
    assert grid.tolist() == [1, 2, 3] and mean.tolist() == [16, 17, 18]
    assert spread.tolist() == pytest.approx([50**0.5] * 3)
    write_csv(groups, [], tmp_path / 'x.csv')
    rows = list(csv.DictReader((tmp_path / 'x.csv').open()))
    assert len(rows) == 3 * 2 * 3 and rows[0]['value'] == '11.0' and rows[0]['kind'] == 'loss'
    axis = draw_curves(groups, None).axes[0]
    assert axis.lines[0].get_ydata().tolist() == [16, 17, 18]
    assert axis.lines[0].get_label().endswith('2 seeds')


def test_spread_where_seeds_were_logged_elsewhere():
    one = Curve(np.array([0, 10]), np.array([0.0, 1.0]), np.array([0.0, 10.0]))
    other = Curve(np.array([5, 15]), np.array([0.0, 2.0]), np.array([7.0, 17.0]))
    grid, mean, _ = mean_and_spread([one, other], 'steps')
    assert grid.tolist() == [5, 10] and mean.tolist() == [6, 11]


def test_drops_of_the_learning_rate():
    def drops(*lr):
        return lr_drops(Curve(10 * np.arange(1, len(lr) + 1), None, np.array(lr)))

    assert drops(0.01, 0.05, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001) == [50, 70]
    assert drops(*(0.05 * (1 + np.cos(np.pi * np.arange(20) / 20)))) == []  # a cosine halves, but has no plateaus
    assert drops() == drops(0.1) == []


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match='has no run'):
        read_run(tmp_path)
    write_run(tmp_path / 'a', [], name='a')
    write_run(tmp_path / 'b', [], name='b')
    with pytest.raises(UserError, match='several configs, a, b: name the folder of each'):
        read_run(tmp_path)
