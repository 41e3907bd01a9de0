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


def test_a_new_report_is_empty():
    first, second = (Report('enhanced', nn.Identity()) for _ in range(2))
    first.changed['a'] = 'done'
    assert str(second) == 'enhanced 0 of 0 norms of Identity'
