"""Arithmetic of a GPU that numpy lacks. Registers are arrays of unsigned integers of their size, predicates of bool.

An array has one element for each lane, or only one where all lanes have the same value.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
DTYPES = {
    'b8': 'u1', 'u8': 'u1', 's8': 'i1', 'b16': 'u2', 'u16': 'u2', 's16': 'i2', 'f16': 'f2', 'bf16': 'u2', 'b32': 'u4',
    'u32': 'u4', 's32': 'i4', 'f32': 'f4', 'tf32': 'f4', 'f16x2': 'u4', 'bf16x2': 'u4', 'b64': 'u8', 'u64': 'u8',
    's64': 'i8', 'f64': 'f8', 'f32x2': 'u8', 'pred': '?',
}  # fmt: skip
UNSET = {1: 0xFE, 2: 0x7FC1, 4: 0x7FC0DEAD, 8: 0x7FF8DEAD0000DEAD}  # a NaN: what no one has written


def unset(size: int) -> Array:
    return np.array([UNSET[size]], f'u{size}')


def float_of_bf16(value: Array) -> Array:
    return (value.astype('u4') << np.uint32(16)).view('f4')


def bf16_of_float(value: Array) -> Array:
    bits = np.ascontiguousarray(value, 'f4').view('u4')
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype('u2')
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded there first, so where that lands halfway between two floats, the
    part that was lost decides (of results that are no subnormal numbers).
    """
    product = np.multiply(a, b, dtype='f8')
    total = product + c
    halfway = (total.view('u8') & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    if halfway.any():
        product, c = np.broadcast_arrays(product, c.astype('f8'))
        back = total - product
        lost = (product - (total - back)) + (c - back)
        nudged = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
        total = np.where(halfway & (lost != 0), nudged, total)
    return total.astype('f4')


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Of float64, rounded twice: numpy has nothing wider everywhere."""
    return a * b + c


def low_half(value: Array) -> Array:
    """The first of two packed values: of 16 bits in 32, or of 32 bits in 64."""
    return value.astype('u2') if value.dtype.itemsize == 4 else value.astype('u4')


def high_half(value: Array) -> Array:
    return low_half(value >> value.dtype.type(4 * value.dtype.itemsize))


def pack(low: Array, high: Array) -> Array:
    size = low.dtype.itemsize
    wide = np.dtype(f'u{2 * size}')
    return low.view(f'u{size}').astype(wide) | (high.view(f'u{size}').astype(wide) << wide.type(8 * size))


def quotient(a: Array, b: Array) -> Array:
    """Of integers, towards zero; division by zero gives what numpy gives."""
    if a.dtype.itemsize <= 4:
        return np.trunc(a.astype('f8') / b.astype('f8')).astype('i8').astype(a.dtype)
    b = np.where(b == 0, 1, b).astype(a.dtype)
    result = a // b
    if a.dtype.kind == 'i':
        result = result + ((a - result * b != 0) & ((a < 0) != (b < 0)))
    return result


def remainder(a: Array, b: Array) -> Array:
    return a - b * quotient(a, b)


def shift_left(value: Array, count: Array) -> Array:
    bits = 8 * value.dtype.itemsize
    shifted = value << np.minimum(count, bits - 1).astype(value.dtype)
    return shifted if (count < bits).all() else np.where(count < bits, shifted, value.dtype.type(0))


def shift_right(value: Array, count: Array) -> Array:
    """Of signed values the sign fills, of unsigned ones 0."""
    bits = 8 * value.dtype.itemsize
    shifted = value >> np.minimum(count, bits - 1).astype(value.dtype)
    if value.dtype.kind == 'i' or (count < bits).all():
        return shifted
    return np.where(count < bits, shifted, value.dtype.type(0))


def bit_field(value: Array, first: Array, length: Array) -> Array:
    """bfe.u32."""
    mask = np.where(length >= 32, np.uint32(0xFFFFFFFF), (np.uint32(1) << np.minimum(length, 31)) - np.uint32(1))
    return shift_right(value, first) & mask.astype('u4')


def signed_bit_field(value: Array, first: Array, length: Array) -> Array:
    """bfe.s32: the field's top bit is its sign."""
    above = np.uint32(31) - np.minimum(first + length - np.uint32(1), np.uint32(31))
    field = shift_right(shift_left(value.view('u4'), above).view('i4'), above + first)
    return np.where(length == 0, np.int32(0), field).astype('i4')


def any_function(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: the boolean function of three bits that ``table`` says."""
    result = np.zeros(1, 'u4')
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def permute(a: Array, b: Array, selectors: Array) -> Array:
    """prmt: four of the eight bytes of a and b; a selector's top bit asks for the sign instead."""
    both = a.astype('u8') | (b.astype('u8') << np.uint64(32))
    result = np.zeros(1, 'u4')
    for i in range(4):
        selector = (selectors >> np.uint32(4 * i)) & np.uint32(15)
        byte = ((both >> (np.uint32(8) * (selector & np.uint32(7))).astype('u8')) & np.uint64(255)).astype('u4')
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        result = result | (np.where(selector & np.uint32(8), sign, byte) << np.uint32(8 * i))
    return result


def integer_of(value: Array, dtype: str) -> Array:
    """A float that is whole as an integer; beyond the range the nearest one, NaN as 0."""
    limits = np.iinfo(dtype)
    value = np.nan_to_num(value.astype('f8'), nan=0.0, posinf=np.inf, neginf=-np.inf)
    inside = np.clip(value, limits.min, limits.max)
    with np.errstate(invalid='ignore'):
        result = inside.astype(dtype)
    return np.where(inside >= limits.max, limits.max, result).astype(dtype)


def tf32_of(value: Array) -> Array:
    """float32 with 10 bits of fraction, nearest, ties away from zero (cvt.rna)."""
    bits = value.view('u4')
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view('f4')
    return np.where(np.isfinite(value), rounded, value)


ROUNDINGS = {'rni': np.rint, 'rzi': np.trunc, 'rmi': np.floor, 'rpi': np.ceil}
