"""tools/dev/cost_table.py: the printed costs are met, and a wrong one, here or there, is noticed."""

import json
import subprocess
import sys

import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from torch import nn

import cost_table as tool
from bnet_mm import BNET
from bnet_mm.cli import UserError
from helpers.hosts import import_host_models
from helpers.paths import REPO, SHARED_DATA

TOOL = REPO / 'tools' / 'dev' / 'cost_table.py'


@pytest.fixture(scope='module')
def rows():
    for library in tool.LIBRARIES.values():
        import_host_models(library)
    return [tool.compare(row) for row in tool.printed_rows()]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['cost_table.py', *arguments])
    tool.main()


def test_check_passes(rows):
    assert tool.check(rows) == '97 printed figures: 87 are met, 10 are known exceptions'
    excepted = {
        (row['table'], row['row'], figure)
        for row in rows
        for figure, verdict in row['verdict'].items()
        if verdict.startswith('excepted: ')
    }
    assert excepted == set(tool.EXCEPTIONS)
    counted = {row['config']: row['counted'] for row in rows}
    # Printed for this model by mmdetection 2.x: 207.07 GFLOPs, 41.53 M.
    assert counted['faster_rcnn_r50_bn_1x.py'] == dict(params_m=41.528, gflops=207.065)


def test_a_falsified_print_fails(rows, monkeypatch, capsys):
    """A figure that is met, and one that is excepted, but with another count than is found."""
    printed = tool.printed_rows()
    monkeypatch.setattr(tool, 'printed_rows', lambda table: [row for row in printed if row['table'] == table])
    next(row for row in printed if row['label'] == 'Faster R-CNN ResNet-101, BNET-3')['gflops'] = 284.9
    with pytest.raises(UserError) as error:
        run(monkeypatch, '--table', '5', '--check')
    want = '1 of 22 printed figures are not met: Table 5, Faster R-CNN ResNet-101, BNET-3, GFLOPs: 284.9 printed, '
    assert str(error.value) == f'{want}284.779 counted'
    assert '284.779 NOT MET' in capsys.readouterr().out
    for changed in (4.0, 4.3):
        monkeypatch.setitem(tool.EXCEPTIONS, (8, 1, 'gflops'), (changed, 'no reason'))
        with pytest.raises(UserError, match='Table 8, TSN ResNet-50, BN, GFLOPs: 4.3 printed, 4.12 counted'):
            run(monkeypatch, '--table', '8', '--check')


def test_formats(rows, monkeypatch, capsys):
    run(monkeypatch, '--table', '13')
    text = capsys.readouterr().out
    assert [line.split() for line in text.splitlines()[:3]] == [
        ['Table', '13'],
        ['row', 'printed', '#Params,', 'M', 'counted', 'printed', 'GFLOPs', 'counted', 'rule'],
        ['RetinaNet', 'ResNet-101,', 'BN', '56.7', '56.735', '315.4', '315.389', 'mmcv'],
    ]
    assert '319.946 [1]' in text and '\n[1] excepted: 0.004 short' in text and '\nmmcv: ' in text
    assert max(map(len, text.splitlines())) <= 120

    run(monkeypatch, '--table', '13', '--format', 'markdown')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '**Table 13**' and lines[3].startswith('| ---')
    assert {line.count('|') for line in lines[2:6]} == {7}

    run(monkeypatch, '--table', '3', '--format', 'json', '--check')
    captured = capsys.readouterr()
    assert captured.err == '14 printed figures: 11 are met, 3 are known exceptions\n'
    found = json.loads(captured.out)
    assert found == [row for row in rows if row['table'] == 3]
    assert found[3]['counted'] == dict(params_m=1.997, mflops=113.5) and found[3]['mflops'] == 113


def test_as_a_command():
    done = subprocess.run([sys.executable, TOOL, '--table', '4'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.splitlines()[-1] == 'error: --table 4: the tables with costs are 1, 2, 3, 5, 8, 9, 10, 11, 13'


def test_a_missing_library(monkeypatch):
    monkeypatch.setattr(tool, 'count_config', tool.count_config.__wrapped__)
    monkeypatch.setitem(sys.modules, 'mmseg.models', None)
    rows = [tool.compare(row) for row in tool.printed_rows(1) if row['task'] == 'segmentation']
    assert rows[0]['counted'] == dict(params_m=None, gflops=None)
    assert '| not counted [1] | 354.4' in '\n'.join(tool.page(rows, True))
    with pytest.raises(UserError, match='4 of 4 .* 49.0 printed, not counted: mmseg cannot be imported'):
        tool.check(rows)


def layers(norm):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


def test_count_of_a_small_model():
    """By hand: the maps after the first convolution are 4 x 4 x 5, that is 80 elements."""
    pytest.importorskip('mmcv')

    def count(norm, rule):
        return tool.count_flops(layers(norm), 'classification', (8, 10), rule)

    convolution, transform, linear = 80 * 3 * 3 * 3, 80 * 3 * 3, 4 * 5
    assert count(BNET(4, k=3), 'multiply-adds') == convolution + transform + linear
    assert count(nn.BatchNorm2d(4), 'multiply-adds') == convolution + linear
    bias = norm_alone = activation = pooled = 80
    around = convolution + bias + activation + pooled + linear
    assert count(BNET(4, k=3), 'mmcv') == around + norm_alone + transform + bias
    assert count(BNET(4, k=3, norm='SyncBN'), 'mmcv') == around + transform + bias
    assert count(nn.BatchNorm2d(4), 'mmcv') == around + 2 * norm_alone


def test_the_libraries_count_the_same():
    complexity = pytest.importorskip('mmcv.cnn').get_model_complexity_info
    from_mmcv, _ = complexity(layers(nn.BatchNorm2d(4)), (3, 8, 10), print_per_layer_stat=False, as_strings=False)
    assert tool.count_flops(layers(nn.BatchNorm2d(4)), 'classification', (8, 10), 'mmcv') == from_mmcv
    analyzer = FlopAnalyzer(layers(BNET(4, k=3)).eval(), torch.zeros(1, 3, 8, 10))
    from_mmengine = analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    counted = tool.count_flops(layers(BNET(4, k=3)), 'classification', (8, 10), 'multiply-adds')
    assert counted == from_mmengine['conv'] + from_mmengine['linear']


@pytest.mark.data
def test_printed_figures_are_those_of_the_paper():
    tables = json.loads((SHARED_DATA.parent / 'reference' / 'tables.json').read_text())
    keys = ('params_m', 'gflops', 'mflops')
    entries = {
        (int(entry['table'].split()[1]), entry['row'] + 1): entry
        for entry in tables
        if entry['source'] == 'bnet_paper.txt' and entry['table'].split()[1] in '1 2 3 5 8 9 10 11 13'.split()
    }
    paper = {
        place: {key: entry['fields'][key] for key in keys if key in entry['fields']} for place, entry in entries.items()
    }
    rows = tool.printed_rows()
    assert {(row['table'], row['row']): {key: row[key] for key in keys if key in row} for row in rows} == paper
    assert len({(row['table'], row['label']) for row in rows}) == len(rows) == 51
    for row in rows:
        fields = entries[row['table'], row['row']]['fields']
        assert (tool.CONFIGS / row['config']).is_file() and row['task'] == fields['task']
        norm = f'_bnet{fields.get("kernel_size", 3)}_' if fields['norm'] == 'BNET' else '_bn'
        assert norm in row['config'] and ('bnet' in row['config']) == (fields['norm'] == 'BNET')
