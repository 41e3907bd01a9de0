"""Checks of constructor arguments."""

import numpy as np
import pytest

from bnet_mm.layers.arguments import check_positive_int


@pytest.mark.parametrize('value', [1, 3, 2, 10**9, np.int64(5)])
def test_positive_integers_pass(value):
    check_positive_int('Layer', 'size', value)
    if value % 2:
        check_positive_int('Layer', 'size', value, odd=True)


@pytest.mark.parametrize('value', [0, -3, 2.0, True, False, '3', None, (3, 3)])
def test_others_are_named(value):
    for odd, allowed in ((False, 'a positive integer'), (True, 'a positive odd integer')):
        with pytest.raises(ValueError) as error:
            check_positive_int('Layer', 'size', value, odd)
        assert str(error.value) == f'Layer: size must be {allowed}, got {value!r}'


def test_even_numbers_where_odd_ones_are_asked():
    with pytest.raises(ValueError, match='Layer: size must be a positive odd integer, got 4'):
        check_positive_int('Layer', 'size', 4, odd=True)
