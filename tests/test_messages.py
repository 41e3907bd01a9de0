"""Words that several messages share."""

import pytest

from bnet_mm.messages import first_of


@pytest.mark.parametrize('names, most, text', [
    ([], 4, ''), (['a'], 4, 'a'), ('abcd', 4, 'a, b, c, d'), ('abcde', 4, 'a, b, c, d and 1 more'),
    (range(5), 2, '0, 1 and 3 more'), ((name for name in 'ab'), 1, 'a and 1 more'),
])  # fmt: skip
def test_first_of(names, most, text):
    assert first_of(names, most) == text
