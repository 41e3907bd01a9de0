"""tools/dev/gpu_acceptance.sh and gpu_figures.py. What they run on a GPU, tests/gpu, has a short form without one."""

import json
import subprocess

import pytest

import gpu_figures
from gpu_figures import Goal
from helpers.paths import REPO
from helpers.tools import run

XML = '<testsuites><testsuite name="pytest" errors="{}" failures="{}" tests="9"/></testsuites>'


def test_goal_is_met_missed_or_not_measured():
    assert Goal('time', 1.2, 1.2).met is True and Goal('time', 1.2, 1.21).met is False
    assert Goal('time', 1.2, None).met is None


@pytest.mark.parametrize('errors, failures', [(0, 0), (1, 2)])
def test_failures_and_reports_of_sanitizers_are_counted(errors, failures, tmp_path):
    assert [goal.figure for goal in gpu_figures.tests(tmp_path)] == [None]
    assert [goal.figure for goal in gpu_figures.sanitizers(tmp_path)] == [None, None]
    (tmp_path / 'tests.xml').write_text(XML.format(errors, failures))
    (tmp_path / 'memcheck.log').write_text(f'========= ERROR SUMMARY: {errors} errors\n')
    (tmp_path / 'racecheck.log').write_text(f'========= RACECHECK SUMMARY: {failures} hazards displayed (0 errors)\n')
    found = [*gpu_figures.tests(tmp_path), *gpu_figures.sanitizers(tmp_path)]
    assert [goal.figure for goal in found] == [errors + failures, errors, failures]
    assert [goal.met for goal in found] == [errors + failures == 0, errors == 0, failures == 0]


@pytest.mark.hardening
def test_rehearsal(tmp_path):
    done = subprocess.run(
        ['bash', REPO / 'tools/dev/gpu_acceptance.sh', tmp_path], capture_output=True, text=True, timeout=1800
    )
    verdict = json.loads((tmp_path / 'verdict.json').read_text())
    assert done.returncode == 0 and verdict['met'] and 'nothing timed' in verdict['device'], done.stdout
    figures = {goal['name']: goal['figure'] for goal in verdict['goals']}
    assert figures['failed tests of tests/gpu'] == 0 and figures['launches, k=3, evaluation'] == 1
    assert all(value is None for name, value in figures.items() if 'ratio' in name)
    assert all('rehearsal' in line for line in done.stdout.splitlines() if '(at most' in line)


def test_wrong_use():
    done = subprocess.run(['bash', REPO / 'tools/dev/gpu_acceptance.sh', 'a', 'b'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == 'error: one folder at most, got a b\n'
    assert run('tools/dev/gpu_figures.py').returncode == 2
