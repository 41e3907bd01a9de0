"""The table of counts is what the kernels execute, and the bounds that are printed from it are what they say."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton', reason='Triton is not installed')
import triton  # noqa: E402

import roofline  # noqa: E402  (tools/dev)
from ptx import table  # noqa: E402

TOOL = Path(roofline.__file__)
same_compiler = pytest.mark.skipif(
    table.compiler() != triton.__version__, reason=f'counts.csv is of Triton {table.compiler()}'
)


@same_compiler
@pytest.mark.parametrize('kernel, layout, k', [
    ('forward', 'NCHW', 3), ('forward', 'NHWC', 3), ('backward', 'NCHW', 3), ('backward', 'NHWC', 3),
    ('moments', 'NCHW', 0), ('moments', 'NHWC', 0), ('moments_backward', 'NCHW', 0), ('moments_backward', 'NHWC', 0),
])  # fmt: skip
def test_counts(kernel, layout, k):
    keys = [table.Key(kernel, '2x512x7x7', dtype, layout, k) for dtype in ('float32', 'float16')]
    assert not table.differences(table.read(), keys)


@same_compiler
@pytest.mark.ptx
@pytest.mark.parametrize('key', table.read(), ids=lambda key: '-'.join(map(str, key)))
def test_all_counts(key):
    assert not table.differences(table.read(), [key])


def test_a_changed_count_is_found():
    key = table.Key('moments_backward', '2x512x7x7', 'float32', 'NCHW', 0)
    rows = copy.deepcopy(table.read())
    rows[key]['instructions'] += 0.5
    rows[key]['launches'] += 1
    found = table.differences(rows, [key])
    if table.compiler() == triton.__version__:
        assert len(found) == 2
    assert 'instructions' in found[0] and found[0].startswith('moments_backward 2x512x7x7 float32 NCHW 0')
    del rows[key]
    assert table.differences(rows, [key]) == ['moments_backward 2x512x7x7 float32 NCHW 0: not in the table']


def test_the_file_has_every_row():
    assert list(table.read()) == table.keys()


def test_the_document_has_the_table():
    text = table.DOCUMENT.read_text()
    assert table.with_table(text, table.read()) == text


def test_bounds():
    card = roofline.Card(multiprocessors=10, clock=1.0, l1_bytes=64, dram=0.1)
    counts = dict(instructions=0, l1_loaded=3, l1_stored=1, dram_loaded=1, dram_stored=1)
    assert roofline.bound(card, counts, 4) == (8 / 0.1e12, 'DRAM')
    assert roofline.bound(card, {**counts, 'dram_loaded': 0, 'dram_stored': 0}, 4) == (16 / 640e9, 'L1')
    assert roofline.bound(card, {**counts, 'instructions': 1280}, 4) == (1280 / 1280e9, 'issue')


def test_roofline_is_printed():
    command = [sys.executable, str(TOOL), '--card', 'H100', 'T4']
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 'computed from executed instructions, not timed' in text.splitlines()[0]
    assert '\nH100: ' in text and '\nT4: ' in text and 'A100' not in text
    assert len([line for line in text.splitlines() if line.startswith('2x64x56x56')]) >= 2 * 12
