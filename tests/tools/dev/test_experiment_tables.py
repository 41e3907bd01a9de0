"""tools/dev/experiment_tables.py: the page says what the CSV files say."""

from dataclasses import replace

import pytest

import experiment_tables as tool
from bnet_mm.cli import UserError
from bnet_mm.experiments.runs import DONE, Result, write_results

RESULT = Result(
    variant='BN', seed=0, status=DONE, config='', last=70.0, best=71.0, metrics='60 71 70', losses='3 2 1',
    seconds=120.0, cpu_seconds=50.0, resumed=0, threads=1, device='CPU, AVX2', torch='2', bnet_mm='1', revision='',
    date='2026-11-28',
)  # fmt: skip
PLAN = """
about: Does it help?
base: base.py
metric: accuracy/top1
seeds: 2
variants: {BN: , BNET-3: {than: BN}}
claims: [{source: Table 2, says: it does, printed: 0.7, variant: BNET-3, than: BN}]
"""
PAGE = 'Words.\n\n<!-- experiment: small -->\nold\n<!-- /experiment -->\n\nMore words.\n'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'base.py').write_text('')
    (tmp_path / 'small.yml').write_text(PLAN)
    return tmp_path


def test_page_is_not_stale():
    page = tool.FOLDER / 'README.md'
    assert tool.page_text(page.read_text(), tool.FOLDER) == page.read_text()


def test_section(folder):
    assert 'Not run yet.' in tool.page_text(PAGE, folder)
    results = [replace(RESULT, variant=name, seed=seed, last=70 + seed + (name == 'BNET-3') * (1 + seed / 10))
               for name in ('BN', 'BNET-3') for seed in (0, 1)]  # fmt: skip
    write_results([*results, replace(RESULT, seed=2, status='error: no memory')], folder / 'small.csv')
    text = tool.page_text(PAGE, folder)
    assert text.startswith('Words.\n') and text.endswith('More words.\n') and 'old' not in text
    assert '| Table 2: it does | +0.7 | +1.05 | +0.41 to +1.69 | +1.00 to +1.10 | 2 | confirmed here |' in text
    assert '| BN | 70.50 ± 0.71 | 71.00 ± 0.00 | 67.00 ± 0.00 | 2 of 2, 1 failed | 2.0 |' in text
    assert '4 runs, 8 minutes in all (CPU, AVX2, 1 thread; 2026-11-28 to 2026-11-28).' in text
    assert tool.page_text(text, folder) == text


def test_plan_without_a_place(folder):
    with pytest.raises(UserError, match='no place for small'):
        tool.page_text('Words.', folder)
