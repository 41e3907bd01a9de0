"""What a report prints."""

from torch import nn

from bnet_mm.surgery import Report


def test_report():
    report = Report('folded', nn.Sequential(), {'a': 'gone', 'b.c': 'gone too'}, {'d': 'no', 'e': 'why not', 'f': 'no'})
    assert report.summary() == 'folded 2 of 5 norms of Sequential'
    assert str(report).splitlines() == [
        report.summary(), '  a: gone', '  b.c: gone too', 'not folded (2), no:', '  d, f', 'not folded (1), why not:',
        '  e',
    ]  # fmt: skip


def test_tails():
    report = Report('enhanced', nn.Sequential(), {'1.bn': 'BNET'}, tails={'1': '', '2': 'no', '3': ''})
    assert str(report).splitlines()[2:] == [
        'norm, sum and ReLU of residual blocks in one pass (2):', '  1, 3',
        'norm, sum and ReLU of residual blocks one after the other (1), no:', '  2',
    ]  # fmt: skip


def test_a_new_report_is_empty():
    first, second = (Report('enhanced', nn.Identity()) for _ in range(2))
    first.changed['a'] = 'done'
    assert str(second) == 'enhanced 0 of 0 norms of Identity'
