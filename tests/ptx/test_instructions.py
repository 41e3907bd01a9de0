"""Single instructions against an independent computation: what the other tests rest on."""

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip('triton', reason='Triton is not installed')
from ptx import values  # noqa: E402
from ptx.counts import bank_conflicts  # noqa: E402
from ptx.reader import parse, read  # noqa: E402
from ptx.snippets import FRAME, execute  # noqa: E402

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def one(value, dtype='f4'):
    return np.array([value], dtype)


def rounded(value: Fraction) -> float:
    """The nearest float32, ties to even, by integers only."""
    if value == 0:
        return 0.0
    sign, value = (-1 if value < 0 else 1), abs(value)
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - 24
    while value / Fraction(2) ** exponent >= 2**24:
        exponent += 1
    exponent = max(exponent, -149)
    return sign * float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(floats, floats, floats, st.booleans())
def test_fma_rounds_once(a, b, c, cancels):
    c = -float(np.float32(a) * np.float32(b)) if cancels and abs(a * b) < 2.0**100 else c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact and abs(exact) < Fraction(2) ** -120:
        return  # subnormal numbers may be rounded twice, as values.fma says
    assert float(values.fma(one(a), one(b), one(c))[0]) == rounded(exact)


def test_fma_where_rounding_twice_would_differ():
    """The sum lies beside the middle of two floats, by less than float64 can add to it."""
    for sign in (1, -1):
        a, b, c = one(2**-12 * (1 + 2**-18)), one(sign * 2**-12 * (1 - 2**-18)), one(sign * (1 + 2**-23))
        exact = sum(Fraction(float(p[0])) * Fraction(float(q[0])) for p, q in ((a, b), (c, one(1.0))))
        twice = float(np.float32(np.float64(a[0]) * np.float64(b[0]) + np.float64(c[0])))
        assert float(values.fma(a, b, c)[0]) == rounded(exact) != twice


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_bfloat16_as_torch(bits):
    value = one(bits, 'u4').view('f4')
    ours = values.float_of_bf16(values.bf16_of_float(value))
    theirs = torch.from_numpy(value).bfloat16().float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 0xFFFF))
def test_integers(a, b, count, selectors):
    x, y, n = one(a, 'u4'), one(b, 'u4'), one(count, 'u4')
    signed_a, signed_b = (value - 2**32 if value >> 31 else value for value in (a, b))
    assert int(values.shift_left(x, n)[0]) == (a << count) % 2**32
    assert int(values.shift_right(x, n)[0]) == a >> count
    assert int(values.shift_right(x.view('i4'), n)[0]) == signed_a >> count
    if b:
        truncated = abs(signed_a) // abs(signed_b) * (1 if signed_a * signed_b >= 0 else -1)
        if truncated < 2**31:
            assert int(values.quotient(x.view('i4'), y.view('i4'))[0]) == truncated
            assert int(values.remainder(x.view('i4'), y.view('i4'))[0]) == signed_a - truncated * signed_b
        assert int(values.quotient(x, y)[0]) == a // b
        assert int(values.quotient(x.astype('u8'), y.astype('u8'))[0]) == a // b
    assert int(values.any_function(x, y, n, 0x96)[0]) == a ^ b ^ count  # three-way exclusive or
    data = struct.pack('<II', a, b)
    chosen = [selectors >> 4 * i & 15 for i in range(4)]
    expected = [data[s & 7] if s < 8 else (255 if data[s & 7] >> 7 else 0) for s in chosen]
    assert int(values.permute(x, y, one(selectors, 'u4'))[0]) == int.from_bytes(bytes(expected), 'little')
    assert int(values.bit_field(x, one(count % 32, 'u4'), one(5, 'u4'))[0]) == a >> count % 32 & 31


def test_integers_of_floats_saturate():
    value = np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, 2.5], 'f4')
    found = values.integer_of(np.rint(value), 'i4')
    assert found.tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 2]


def results(body: str, dtype=torch.int32) -> torch.Tensor:
    out = torch.zeros(32, dtype=dtype)
    execute(body + '\nst.global.b32 [%d4], %r9;', out, shared_bytes=1024)
    return out


LANE = torch.arange(32, dtype=torch.int32)


@pytest.mark.parametrize(
    'body, expected',
    [
        ('mad.lo.s32 %r9, %r1, 3, 5;', LANE * 3 + 5),
        ('sub.s32 %r3, %r1, 16;\nmul.hi.s32 %r9, %r3, 0x40000000;', (LANE - 16) >> 2),
        ('sub.s32 %r3, %r1, 16;\nmul.wide.s32 %d6, %r3, 1000;\ncvt.u32.u64 %r9, %d6;', (LANE - 16) * 1000),
        ('mul.wide.u32 %d6, %r1, -1;\nshr.u64 %d7, %d6, 32;\ncvt.u32.u64 %r9, %d7;', (LANE - 1).clamp(min=0)),
        ('neg.s32 %r9, %r1;', -LANE),
        ('sub.s32 %r3, %r1, 16;\nabs.s32 %r9, %r3;', (LANE - 16).abs()),
        ('sub.s32 %r3, %r1, 16;\nmax.s32 %r9, %r3, 0;', (LANE - 16).clamp(min=0)),
        ('sub.s32 %r3, %r1, 16;\nmin.u32 %r9, %r3, 20;', torch.where(LANE < 16, 20, (LANE - 16).clamp(max=20))),
        ('cvt.u16.u32 %h1, %r1;\nmov.b32 %r9, {%h1, %h1};', LANE * 65537),
        ('mov.b32 {%h1, %h2}, 0x00070003;\ncvt.u32.u16 %r9, %h2;', LANE * 0 + 7),
        ('cvt.u16.u32 %h1, %r1;\nneg.s16 %h2, %h1;\ncvt.s32.s16 %r9, %h2;', -LANE),
        ('setp.lt.and.s32 %p1, %r1, 9, 1;\nselp.b32 %r9, 1, 0, %p1;', (LANE < 9).int()),
        ('setp.lt.s32 %p1|%p2, %r1, 9;\nselp.b32 %r9, 1, 0, %p2;', (LANE >= 9).int()),
        ('setp.ge.u32 %p1, %r1, 9;\nmov.b32 %r9, 3;\n@!%p1 mov.b32 %r9, 4;', 3 + (LANE < 9).int()),
        ('shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;', LANE ^ 5),
        ('shfl.sync.up.b32 %r9, %r1, 3, 0, -1;', torch.where(LANE >= 3, LANE - 3, LANE)),
        ('shfl.sync.down.b32 %r9, %r1, 3, 31, -1;', torch.where(LANE < 29, LANE + 3, LANE)),
        ('shfl.sync.idx.b32 %r9, %r1, 7, 31, -1;', LANE * 0 + 7),
        ('shfl.sync.bfly.b32 %r9, %r1, 16, 4127, -1;', LANE % 16),  # segments of 16 lanes: only earlier ones are read
        ('cvt.rn.f32.s32 %r3, %r1;\nmul.f32 %r4, %r3, 0f3FC00000;\ncvt.rzi.s32.f32 %r9, %r4;', LANE * 3 // 2),
        ('not.b32 %r9, %r1;', ~LANE),
        ('bfe.u32 %r9, %r1, 1, 3;', (LANE >> 1) & 7),
        ('bfe.s32 %r9, %r1, 1, 3;', ((LANE >> 1) & 7) - ((LANE >> 3) & 1) * 8),
        ('redux.sync.add.s32 %r9, %r1, -1;', LANE * 0 + 496),
        ('sub.s32 %r3, %r1, 16;\nredux.sync.min.s32 %r9, %r3, -1;', LANE * 0 - 16),
        ('sub.s32 %r3, %r1, 16;\nredux.sync.min.u32 %r9, %r3, -1;', LANE * 0),
    ],
)
def test_instructions(body, expected):
    assert torch.equal(results(body), expected.int())


def test_predicates_and_floats():
    nan = '0f7FC00000'
    for comparison, of_nan, of_equal in (
        ('eq', 0, 1), ('ne', 0, 0), ('lt', 0, 0), ('ge', 0, 1), ('equ', 1, 1), ('neu', 1, 0), ('nan', 1, 0),
        ('num', 0, 1),
    ):  # fmt: skip
        for other, expected in ((nan, of_nan), ('0f3F800000', of_equal)):
            found = results(f'setp.{comparison}.f32 %p1, 0f3F800000, {other};\nselp.b32 %r9, 1, 0, %p1;')
            assert found.tolist() == [expected] * 32, (comparison, other)
    assert results(f'max.f32 %r9, 0f3F800000, {nan};', torch.float32).tolist() == [1.0] * 32
    assert results(f'max.NaN.f32 %r9, 0f3F800000, {nan};', torch.float32).isnan().all()
    assert results('neg.f32 %r9, 0f00000000;').tolist() == [-(2**31)] * 32


@pytest.mark.parametrize('kind, narrow', [('f16', torch.float16), ('bf16', torch.bfloat16)])
def test_packed_and_mixed_precision(kind, narrow):
    a, b = torch.randn(32), torch.randn(32)
    for body, expected in (
        (f'cvt.rn.{kind}x2.f32 %r9, %r5, %r4;', None),
        (f'cvt.rn.{kind}x2.f32 %r6, %r5, %r4;\nadd.{kind}x2 %r9, %r6, %r6;', 'double'),
        (f'cvt.rn.{kind}x2.f32 %r6, %r5, %r4;\nabs.{kind}x2 %r6, %r6;\nneg.{kind}x2 %r9, %r6;', 'sign'),
        (f'cvt.rn.{kind}x2.f32 %r6, %r5, %r4;\nfma.rn.{kind}x2 %r9, %r6, %r6, %r6;', 'fma'),
    ):
        out = torch.stack([a, b]).reshape(-1).clone()
        execute(f'ld.global.b32 %r4, [%d4];\nld.global.b32 %r5, [%d4+128];\n{body}\nst.global.b32 [%d4], %r9;', out)
        found = out[:32].view(narrow).view(32, 2)
        x = torch.stack([a, b], 1).to(narrow)
        wanted = {None: x, 'double': x + x, 'sign': -x.abs(), 'fma': (x.double() * x.double() + x.double()).to(narrow)}[
            expected
        ]
        assert torch.equal(found, wanted)
    out = a.clone()
    execute(f'ld.global.b32 %r4, [%d4];\ncvt.rn.{kind}.f32 %h1, %r4;\nadd.rn.f32.{kind} %r9, %h1, %r4;\n'
            'st.global.b32 [%d4], %r9;', out)  # fmt: skip
    assert torch.equal(out, a.to(narrow).float() + a)
    a[::3], a[1::9] = 0, float('nan')
    for comparison, expected in (('le', a.to(narrow) <= 0), ('leu', ~(a.to(narrow) > 0))):
        out = a.clone()
        execute(f'ld.global.b32 %r4, [%d4];\ncvt.rn.{kind}.f32 %h1, %r4;\nmov.b16 %h2, 0;\n'
                f'setp.{comparison}.{kind} %p1, %h1, %h2;\nselp.b32 %r9, 1, 0, %p1;\nst.global.b32 [%d4], %r9;',
                out)  # fmt: skip
        assert torch.equal(out.view(torch.int32), expected.int())


@pytest.mark.parametrize('kind, narrow', [('f16', torch.float16), ('bf16', torch.bfloat16)])
@pytest.mark.parametrize('comparison', ['le', 'leu', 'gt'])
def test_comparisons_of_packed_halves(kind, narrow, comparison):
    """The lower halves to the first predicate, the upper ones to the second."""
    torch.manual_seed(0)
    halves = torch.randn(32, 2).to(narrow)
    halves[::3, 0], halves[1::4, 1], halves[5], halves[9] = 0, 0, 0, float('nan')
    out = halves.view(torch.int32)[:, 0].clone()
    execute(f'ld.global.b32 %r4, [%d4];\nmov.b32 %r5, 0;\nsetp.{comparison}.{kind}x2 %p1|%p2, %r4, %r5;\n'
            'selp.b32 %r6, 1, 0, %p1;\nselp.b32 %r7, 2, 0, %p2;\nadd.s32 %r9, %r6, %r7;\nst.global.b32 [%d4], %r9;',
            out)  # fmt: skip
    expected = {'le': halves <= 0, 'leu': ~(halves > 0), 'gt': halves > 0}[comparison].int()
    assert torch.equal(out, expected[:, 0] + 2 * expected[:, 1])


def test_matrices_go_through_shared_memory_and_back():
    """stmatrix of fragments, then ldmatrix, both transposed or not; rows of 16 bytes at an own place each."""
    for store, load, transposed in (('', '', False), ('.trans', '.trans', False), ('.trans', '', True)):
        out = torch.zeros(32, dtype=torch.int32)
        execute(f"""
            mul.lo.u32 %r3, %r1, 0x00020002;
            add.s32 %r3, %r3, 0x00010000;
            shl.b32 %r4, %r1, 4;
            and.b32 %r4, %r4, 127;
            stmatrix.sync.aligned.m8n8.x1{store}.shared.b16 [%r4], {{%r3}};
            bar.sync 0;
            ldmatrix.sync.aligned.m8n8.x1{load}.shared.b16 {{%r5}}, [%r4];
            st.global.b32 [%d4], %r5;""", out, shared_bytes=128)  # fmt: skip
        matrix = out.view(torch.int16).view(8, 8)
        wanted = torch.arange(64, dtype=torch.int16).view(8, 8)
        assert torch.equal(matrix, wanted.t() if transposed else wanted)


def test_bank_conflicts():
    lane = np.arange(32)
    warp = lane * 0
    cases = ((1, 4, 0), (2, 4, 1), (32, 4, 31), (0, 4, 0), (33, 4, 0), (2, 8, 0), (4, 16, 0), (8, 16, 4))
    for stride, size, extra in cases:
        assert bank_conflicts(warp, lane, lane * 4 * stride, size) == extra, (stride, size)


def test_counts_of_a_launch():
    x = torch.zeros(2048, dtype=torch.int32)
    body = 'mul.lo.u32 %r3, %r1, {step};\nmul.wide.u32 %d6, %r3, 4;\nadd.s64 %d7, %d1, %d6;\nld.global.b32 %r4, [%d7];'
    for step, sectors in ((1, 4), (2, 8), (8, 32), (0, 1)):
        counts = execute(body.format(step=step), x, programs=3, threads=64, counting=True).counts
        assert counts['sectors loaded'] == (3 * 2 * sectors if step != 1 else 24)
        assert counts['load 32 bits'] == 3 * 64 and counts['instructions'] == 3 * 64 * 12
        assert counts['sectors loaded once'] == (1 if step == 0 else 2 * sectors)


def test_reader():
    i = parse('@!%p1 ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd17 + -8 ]', 'a.py:3')
    assert (i.opcode, i.kind, i.guard, i.negated, i.source) == ('ld', 'b32', 'p1', True, 'a.py:3')
    assert i.operands == ('{ %r1, %r2 }', '[ %rd17 + -8 ]')
    kernel = read(FRAME.format(body='.loc 1 7 3 // b.py:7:3 @[ c.py:9:1 ]\nbar.sync 0;\n.loc 1 8 3\nmov.b32 %r3, 0;'))
    assert [len(block.instructions) for block in kernel.blocks] == [8, 2]
    assert kernel.blocks[0].instructions[-1].source == 'b.py:7 called at c.py:9'
    assert kernel.blocks[1].instructions[0].source == 'snippet.py:8'
    with pytest.raises(ValueError, match='no .entry'):
        read('.version 8.7')
