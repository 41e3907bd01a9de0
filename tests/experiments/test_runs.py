"""Real trainings of a plan: pairs, resuming, failures."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from mmengine.config import Config

from bnet_mm.cli import UserError
from bnet_mm.experiments.runs import (
    DONE,
    Result,
    place_of,
    read_results,
    run_plan,
    still_to_run,
    trained_weights,
    write_results,
)
from bnet_mm.experiments.tables import claim_rows, variant_rows
from helpers.paths import REPO
from helpers.tools import assert_one_clear_sentence, call_tool, run

RESULT = Result(
    variant='BN', seed=0, status=DONE, config='', last=2.0, best=3.0, metrics='1 3 2', losses='3 2 1', seconds=60.0,
    cpu_seconds=50.0, resumed=0, threads=1, device='CPU', torch='2', bnet_mm='1', revision='', date='2026-11-28',
)  # fmt: skip


def weights(folder):
    return torch.load(next(folder.glob('run/epoch_3.pth')), weights_only=False)['state_dict']


def test_plan_is_trained_and_a_failure_does_not_stop_it(make_plan, tmp_path):
    plan = make_plan(more='broken: {than: BN, options: {model.backbone.type: Nothing}}')
    write_results([replace(RESULT, config=plan.digest(plan.variants['BN']))], plan.csv)  # it is not repeated
    work = tmp_path / 'work'
    done = run('tools/experiment.py', plan.path, '--work-dir', work, '--results', tmp_path, '--workers', 2)
    assert done.returncode == 0, done.stderr[-3000:]
    results = {result.variant: result for result in read_results(plan.csv)}
    assert len(results['BNET-3'].metrics.split()) == len(results['BNET-3'].losses.split()) == 3
    assert results['BNET-3'].resumed == 0 and results['BNET-3'].cpu_seconds > 1
    assert results['broken'].status.startswith('error: ') and 'Nothing' in results['broken'].status
    assert 'Table 2: better' in done.stdout and '1 failed' in done.stdout
    assert [variant.name for variant, _ in still_to_run(plan)] == ['broken']
    assert not (work / 'shapes' / 'BN').exists()


@pytest.mark.hardening
def test_killed_plan_goes_on_and_ends_as_if_it_had_not_been(make_plan, tmp_path):
    """SIGKILL of the tool and its training in the middle: done runs are not repeated; bits as without the kill."""
    plan = make_plan()
    # One core is one thread, on which equal runs have equal bits.
    tool = ['taskset', '-c', min(os.sched_getaffinity(0)), sys.executable, 'tools/experiment.py', plan.path]
    tool += ['--results', tmp_path]
    command = [*tool, '--work-dir', tmp_path / 'killed']
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    process = subprocess.Popen(list(map(str, command)), cwd=REPO, **quiet)
    bnet = tmp_path / 'killed' / 'shapes' / 'BNET-3' / 'seed0'
    deadline = time.time() + 300
    while not (bnet / 'run' / 'last_checkpoint').exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (first,) = read_results(plan.csv)
    assert first.key == ('BN', 0) and first.status == DONE

    done = run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    again, second = read_results(plan.csv)
    assert again == first
    assert second.status == DONE and second.resumed in (1, 2, 3) and len(second.metrics.split()) == 3

    plan.csv.unlink()
    assert run(*tool, '--work-dir', tmp_path / 'whole').returncode == 0
    results = {result.variant: result for result in read_results(plan.csv)}
    assert (results['BN'].metrics, results['BN'].losses) == (first.metrics, first.losses)
    assert (results['BNET-3'].metrics, results['BNET-3'].losses) == (second.metrics, second.losses)
    whole, killed = weights(tmp_path / 'whole' / 'shapes' / 'BNET-3' / 'seed0'), weights(bnet)
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


def test_a_reader_trains_all_that_was_published(make_plan, tmp_path, capsys):
    """Results of their own are kept apart from the published ones, which --results goes on with."""
    plan = make_plan()
    write_results([replace(RESULT, config=plan.digest(plan.variants['BN']))], plan.csv)
    for options, left in ([], 'BN, seed 0\nBNET-3, seed 0\n'), (['--results', tmp_path], 'BNET-3, seed 0\n'):
        call_tool('experiment', plan.path, '--work-dir', tmp_path / 'own', *options, '--dry-run')
        assert capsys.readouterr().out == left
    with pytest.raises(UserError, match='--results .*nope is no folder'):
        call_tool('experiment', plan.path, '--results', tmp_path / 'nope')


def test_changed_plan_is_refused(make_plan):
    plan = make_plan()
    write_results([replace(RESULT, config=plan.digest(plan.variants['BN']))], plan.csv)
    assert [variant.name for variant, _ in still_to_run(plan)] == ['BNET-3']
    write_results([replace(RESULT, config='of yesterday')], plan.csv)
    with pytest.raises(UserError, match='a changed plan is a new plan'):
        still_to_run(plan)


def test_a_run_of_two_plans_is_trained_once(make_plan, tmp_path):
    """By config, weights and seed; the other plan's name of the variant does not matter, a failure is not shared."""
    plan = make_plan(seeds=2, more='tuned: {than: BN, weights: first/BN}')
    digests = {name: plan.digest(variant) for name, variant in plan.variants.items()}
    beside = [
        replace(RESULT, variant='plain', config=digests['BN'], last=7.0),
        replace(RESULT, variant='plain', config=digests['BNET-3'], seed=1, status='exit code 1'),
        replace(RESULT, variant='plain', config=digests['BNET-3'], seed=5),
    ]
    write_results(beside, tmp_path / 'beside.csv')
    write_results([replace(RESULT, config='', status='exit code 1')], plan.csv)
    left = [(variant.name, seed) for variant, seed in still_to_run(plan)]
    assert left == [('BNET-3', 0), ('tuned', 0), ('BN', 1), ('BNET-3', 1), ('tuned', 1)]
    with pytest.raises(UserError, match='first/BN, seed 0, was not trained'):
        run_plan(plan, tmp_path / 'work', 1, report=lambda result: None)
    assert read_results(plan.csv) == [replace(beside[0], variant='BN')]


def test_weights_of_another_plan(make_plan, tmp_path):
    """The last checkpoint of the run with the same seed, also where the work dir was moved; nothing runs without it."""
    run_dir = place_of(tmp_path, 'first', 'BN, 4 images', 3) / 'run'
    run_dir.mkdir(parents=True)
    (run_dir / 'last_checkpoint').write_text('/old/place/epoch_2.pth')
    (run_dir / 'epoch_2.pth').touch()
    assert trained_weights(tmp_path, 'first/BN, 4 images', 3) == run_dir / 'epoch_2.pth'
    plan = make_plan(more='tuned: {weights: first/BN}')
    with pytest.raises(UserError, match='first/BN, seed 0, was not trained in .*: run the plan first.yml first'):
        run_plan(plan, tmp_path, 1, report=lambda result: None)
    assert read_results(plan.csv) == []


@pytest.fixture
def started(monkeypatch):
    """The runs that were started, as keyword arguments of Popen by command; they fail at once."""
    found, start = {}, subprocess.Popen

    def fail(command, **kwargs):
        found[' '.join(command)] = kwargs
        return start(['false'], **kwargs)

    monkeypatch.setattr(subprocess, 'Popen', fail)
    return found


def test_a_gpu_does_not_wait_for_images(make_plan, tmp_path, monkeypatch, started):
    """Processes read ahead for it; it is a run of the same plan."""
    plan = make_plan()
    digests = {plan.digest(variant) for variant in plan.variants.values()}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    run_plan(plan, tmp_path / 'work', 1, report=lambda result: None)
    results = read_results(plan.csv)
    assert {(result.device, result.status) for result in results} == {('a GPU', 'exit code 1')}
    assert {result.config for result in results} == digests
    for config in (tmp_path / 'work').rglob('*.py'):
        cfg = Config.fromfile(config)
        assert cfg.train_dataloader.num_workers == cfg.val_dataloader.num_workers == 4


def test_a_variant_of_two_processes(make_plan, tmp_path, monkeypatch, started):
    """They share the cores, and have the Python of the tool whichever is active."""
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(6))
    run_plan(make_plan(more='two: {processes: 2}'), tmp_path / 'work', 1, report=lambda result: None)
    found = [(command, kwargs['env']) for command, kwargs in started.items() if 'seed0' in command]
    assert [environment['OMP_NUM_THREADS'] for _, environment in found] == ['6', '6', '3']
    command, environment = found[-1]
    assert 'dist_train.sh' in command and '/two.py 2 --work-dir' in command
    assert environment['PYTHON'] == sys.executable


def test_wrong_arguments(tmp_path):
    assert_one_clear_sentence(run('tools/experiment.py', tmp_path / 'none.yml'), 'none.yml')
    with pytest.raises(UserError, match='--workers takes a number above 0, got 0'):
        call_tool('experiment', 'x.yml', '--workers', '0')


def test_results_are_written_as_they_were(tmp_path):
    results = [RESULT, replace(RESULT, variant='BNET-3, "x"', seed=1, status='error: a, b', last=0.1)]
    write_results(results, tmp_path / 'a.csv')
    assert read_results(tmp_path / 'a.csv') == results


def test_tables(make_plan):
    """Means, deviations, paired differences; what is not run is said."""
    plan = make_plan(seeds=3)
    assert claim_rows(plan, [])[0][2:] == ['not run', '', '', '0', '']
    lasts = {'BN': (10.0, 20.0, 30.0), 'BNET-3': (11.0, 22.0, 33.0)}
    results = [
        replace(RESULT, variant=name, seed=seed, last=last, best=last + 1, metrics=f'0 {last}')
        for name, values in lasts.items()
        for seed, last in enumerate(values)
    ]
    bn, bnet = variant_rows(plan, results)
    assert bn == ['BN', '20.00 ± 10.00', '21.00 ± 10.00', '10.00 ± 5.00', '3 of 3', '1.0']
    assert bnet[1] == '22.00 ± 11.00'
    assert claim_rows(plan, results)[0] == [
        'Table 2: better', '+0.7', '+2.00', '-0.48 to +4.48', '+1.00 to +3.00', '3', 'not visible at this size',
    ]  # fmt: skip
    assert claim_rows(plan, results[:4])[0][2:] == ['+1.00', 'none', 'none', '1', 'one pair says nothing']
