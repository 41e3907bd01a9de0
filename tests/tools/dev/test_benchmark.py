"""The benchmark tool: its tables in README.md are those of the committed rows. Speed itself is not tested."""

import csv
import subprocess
import sys

import benchmark_tables
from helpers.paths import REPO

TOOL = [sys.executable, 'tools/dev/benchmark.py']


def run(*arguments):
    return subprocess.run([*TOOL, *arguments], cwd=REPO, capture_output=True, text=True)


def test_tables_are_those_of_the_rows(tmp_path):
    done = run('readme', '--check')
    assert done.returncode == 0, done.stderr
    for path in (REPO / 'tools' / 'dev' / 'benchmark_results').glob('*.csv'):  # a newer row makes the table stale
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with open(tmp_path / 'layer.csv', newline='') as file:
        *_, last = (row for row in csv.DictReader(file) if row['name'] == 'BNET-5')
    with open(tmp_path / 'layer.csv', 'a', newline='') as file:
        csv.DictWriter(file, last).writerow({**last, 'ratio_to_bn': '123.000'})
    done = run('readme', '--check', '--out', str(tmp_path))
    assert done.returncode == 2 and 'stale' in done.stderr


def test_missing_folder():
    done = run('layer', '--out', 'no/such/folder')
    assert done.returncode == 2 and 'no/such/folder' in done.stderr and 'Traceback' not in done.stderr


def test_norms_are_of_the_device_that_was_measured_last(tmp_path):
    """Also where it had been measured before another one."""
    quantities = ('training step', 'inference', 'saved for backward')
    lines = ['device,quantity,name,ratio_to_bn']
    for device, ratio in (('AVX512', 1), ('AVX2', 2), ('AVX512', 3)):
        lines += [f'"x86_64 {device}, 2 threads",{quantity},GN,{ratio}' for quantity in quantities]
    (tmp_path / 'norms.csv').write_text('\n'.join(lines) + '\n')
    header, _, row = benchmark_tables.norm_table(benchmark_tables.latest(tmp_path / 'norms.csv'))
    assert 'AVX512' in header and row == '| GN | 3.00 | 3.00 | 3.00 |'
