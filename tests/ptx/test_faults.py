"""One deliberate fault of each kind is found, and named: kernel, source line, lanes, address."""

import inspect

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from ptx import launch  # noqa: E402
from ptx.driver import machine  # noqa: E402
from ptx.faults import Fault, UnknownInstruction  # noqa: E402
from ptx.snippets import execute  # noqa: E402

A = torch.arange(64, dtype=torch.int32)


@triton.jit
def scaled(x, y, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2 + 1, mask=(i < n) if MASKED else None)


@triton.jit
def overlapping(y, BLOCK: tl.constexpr, SAME: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = i if SAME else i + tl.program_id(0)
    tl.store(y + i, value.to(tl.float32))


@triton.jit
def neighbour(x, BLOCK: tl.constexpr):
    i, own = tl.arange(0, BLOCK), tl.program_id(0)
    tl.store(x + own * BLOCK + i, tl.load(x + (1 - own) * BLOCK + i) + 1)


@triton.jit
def scaled_sum(x, scale, y, BLOCK: tl.constexpr, AFTER: tl.constexpr):
    """AFTER: the scale multiplies the sum. Before it, the compiler may contract the product into the sum."""
    i = tl.arange(0, BLOCK)
    factor = tl.load(scale + i // (BLOCK // 4))
    value = tl.load(x + i)
    if AFTER:
        total = tl.sum(tl.reshape(value, (4, BLOCK // 4)), 1) * tl.load(scale + tl.arange(0, 4))
    else:
        total = tl.sum(tl.reshape(value * factor, (4, BLOCK // 4)), 1)
    tl.store(y + tl.arange(0, 4), total)


@triton.jit
def far(x, steps, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Writes behind ``steps`` times 2^20 elements, by an offset of 32 or 64 bits."""
    i = tl.program_id(0) * 0 + tl.arange(0, BLOCK)
    offset = steps.to(tl.int64) * 1048576 + i if WIDE else steps * 1048576 + i
    tl.store(x + offset, i.to(tl.int8))


def line_of(function, text: str) -> int:
    lines, first = inspect.getsourcelines(function.fn)
    return first + next(number for number, line in enumerate(lines) if text in line)


def test_a_right_kernel_runs():
    x, y = torch.arange(1000.0), torch.empty(1000)
    with machine() as gpu:
        scaled[(4,)](x, y, 1000, 256, True)
    assert torch.equal(y, x * 2 + 1)
    assert [(done.kernel, done.grid, done.threads) for done in gpu.launches] == [('scaled', (4, 1, 1), 128)]


def test_a_mask_taken_off():
    with machine(), pytest.raises(Fault, match=Fault.OUTSIDE) as found:
        scaled[(4,)](torch.arange(1000.0), torch.empty(1000), 1000, 256, False)
    fault = found.value
    assert fault.kernel == 'scaled' and fault.source == f'test_faults.py:{line_of(scaled, "tl.store")}'
    assert len(fault.lanes) == 12 and {program for program, _ in fault.lanes} == {3}
    assert 'y + 4000 bytes' in fault.address and '3:' in str(fault)


def test_two_programs_on_one_place():
    with machine():
        overlapping[(2,)](torch.empty(256), 256, True)  # equal values are no fault
        with pytest.raises(Fault, match=Fault.PROGRAMS) as found:
            overlapping[(2,)](torch.empty(256), 256, False)
        assert found.value.source.startswith(f'test_faults.py:{line_of(overlapping, "tl.store")}')
        programs = 200  # of several portions
        with pytest.raises(Fault, match=Fault.PROGRAMS):
            overlapping[(programs,)](torch.empty(256), 256, False)


def test_a_program_reads_what_another_writes():
    with machine(), pytest.raises(Fault, match=Fault.READ_OF_WRITTEN):
        neighbour[(2,)](torch.zeros(512), 256)


@pytest.mark.parametrize('loads_first', (True, False))
def test_a_read_of_written_memory_in_either_order(loads_first):
    lines = ['@%p1 ld.global.b32 %r4, [%d4];', '@!%p1 st.global.b32 [%d4], %r1;']
    body = 'setp.eq.u32 %p1, %r2, 0;\n' + '\n'.join(lines if loads_first else lines[::-1])
    with pytest.raises(Fault, match=Fault.READ_OF_WRITTEN) as found:
        execute(body, A.clone(), programs=2)
    assert {program for program, _ in found.value.lanes} == {1 if loads_first else 0}


def test_what_no_one_wrote_is_nan():
    with machine():
        assert torch.empty(100).isnan().all() and torch.empty(3, dtype=torch.bfloat16).isnan().all()
    y = torch.zeros(32)
    execute('st.global.b32 [%d4], %r30;', y)  # a register that nothing has written
    assert y.isnan().all()
    y = torch.zeros(32)
    execute('setp.lt.u32 %p1, %r1, 5;\n@%p1 mov.b32 %r30, 0f3F800000;\nst.global.b32 [%d4], %r30;', y)
    assert torch.equal(y[:5], torch.ones(5)) and y[5:].isnan().all()


@pytest.mark.parametrize('capability', (75, 80, 90, 100, 120))
def test_a_product_contracted_into_a_sum(capability):
    """Lanes of a warp hold sums that differ in the last bit, and all store them to one word: the hardware chooses."""
    x, scale, y = torch.randn(128), torch.randn(4), torch.empty(4)
    exact = x.view(4, 32).double().sum(1) * scale
    with machine(capability):
        with pytest.raises(Fault, match=f'test_faults.py.*{Fault.AMBIGUOUS}'):
            scaled_sum[(1,)](x, scale, y, 128, False)
        scaled_sum[(1,)](x, scale, y, 128, True)
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('wide', (True, False))
def test_an_offset_of_32_bits_beyond_2_31(wide):
    with machine(fresh_is_nan=False):
        x = torch.empty(2**31 + 2**21, dtype=torch.int8)  # never touched but for one page
        if wide:
            far[(1,)](x, 2048, 128, True)
            assert torch.equal(x[2**31 : 2**31 + 128], torch.arange(128, dtype=torch.int8))
        else:
            with pytest.raises(Fault, match=Fault.OUTSIDE):
                far[(1,)](x, 2048, 128, False)


@pytest.mark.parametrize(
    'body',
    [
        'add.s64 %d6, %d1, 2;\nld.global.b32 %r4, [%d6];',
        'ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%d1+4];',
        'ld.global.b64 %d6, [%d4];',
        'st.shared.b32 [%r1], %r1;',
        'shl.b32 %r3, %r1, 2;\nst.shared.v2.b32 [%r3], {%r1, %r1};',
        'shl.b32 %r3, %r1, 3;\nldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r3];',
    ],
    ids=('element', 'vector', 'own', 'shared', 'shared vector', 'row of a matrix'),
)
def test_misaligned(body):
    with pytest.raises(Fault, match=Fault.MISALIGNED):
        execute(body, A, shared_bytes=512)


def test_outside_of_shared_memory():
    with pytest.raises(Fault, match=Fault.OUTSIDE) as found:
        execute('shl.b32 %r3, %r1, 2;\nst.shared.b32 [%r3], %r1;', A, shared_bytes=64)
    assert found.value.lanes == [(0, thread) for thread in range(16, 32)] and '64 of 64' in found.value.address


def test_shared_memory_that_no_one_wrote():
    body = 'shl.b32 %r3, %r1, 2;\nsetp.lt.u32 %p1, %r1, 31;\n@%p1 st.shared.b32 [%r3], %r1;\nld.shared.b32 %r4, [%r3];'
    with pytest.raises(Fault, match=Fault.UNWRITTEN) as found:
        execute(body, A, shared_bytes=128)
    assert found.value.lanes == [(0, 31)]


EXCHANGE = """
shl.b32 %r3, %r1, 2;
xor.b32 %r4, %r3, {distance};
st.shared.b32 [%r3], %r1;
{barrier}
ld.shared.b32 %r5, [%r4];
st.global.b32 [%d4], %r5;
"""


@pytest.mark.parametrize('distance, barrier, races', [(128, '', True), (128, 'bar.sync 0;', False), (4, '', False)])
def test_a_race_of_warps(distance, barrier, races):
    """A load from another warp's word needs the barrier; from another lane of the same warp it does not."""
    result = torch.zeros(64, dtype=torch.int32)
    body = EXCHANGE.format(distance=distance, barrier=barrier)
    if races:
        with pytest.raises(Fault, match=Fault.RACE):
            execute(body, result, threads=64, shared_bytes=256)
    else:
        execute(body, result, threads=64, shared_bytes=256)
        assert torch.equal(result, A ^ (distance // 4))


@pytest.mark.parametrize('barrier', ('', 'bar.sync 0;'))
@pytest.mark.parametrize('second', ('ld.shared.b32 %r5, [%r4];', 'st.shared.b32 [%r4], %r1;'))
def test_a_race_with_a_store(second, barrier):
    """Two warps that write different values to one word; one that writes what another read, and reads after it."""
    body = f"""
    setp.lt.u32 %p1, %r1, 32;
    and.b32 %r3, %r1, 31;
    shl.b32 %r4, %r3, 2;
    @%p1 st.shared.b32 [%r4], %r1;
    bar.sync 0;
    @%p1 {second}
    {barrier}
    @!%p1 st.shared.b32 [%r4], %r1;
    """
    if barrier:
        execute(body, A, threads=64, shared_bytes=128)
    else:
        with pytest.raises(Fault, match=Fault.RACE):
            execute(body, A, threads=64, shared_bytes=128)


@pytest.mark.parametrize('value, ambiguous', [('%r1', True), ('%r2', False)])
@pytest.mark.parametrize('where', ('shared.b32 [%r3]', 'global.b32 [%d1]'))
def test_lanes_of_one_store_on_one_place(where, value, ambiguous):
    body = f'mov.b32 %r3, 0;\nst.{where}, {value};'
    if ambiguous:
        with pytest.raises(Fault, match=Fault.AMBIGUOUS):
            execute(body, A.clone(), shared_bytes=32)
    else:
        execute(body, A.clone(), shared_bytes=32)


DIVERGED = """
setp.lt.u32 %p1, %r1, {limit};
@%p1 bra $L_then;
bra $L_end;
$L_then:
{inside}
$L_end:
"""


def test_a_barrier_that_not_all_lanes_reach():
    execute(DIVERGED.format(limit=64, inside='bar.sync 0;'), A, threads=64)
    with pytest.raises(Fault, match=Fault.BARRIER) as found:
        execute(DIVERGED.format(limit=40, inside='bar.sync 0;'), A, threads=64)
    assert found.value.lanes == [(0, thread) for thread in range(40, 64)]


@pytest.mark.parametrize(
    'inside',
    ['bar.warp.sync -1;', 'ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [0];'],
)
def test_an_instruction_of_a_whole_warp(inside):
    with pytest.raises(Fault, match=Fault.WARP):
        execute(DIVERGED.format(limit=40, inside=inside), A, threads=64, shared_bytes=512)


def test_a_shuffle_with_a_lane_that_is_not_there():
    shuffle = 'shfl.sync.bfly.b32 %r4, %r1, 16, 31, -1;'
    with pytest.raises(Fault, match=Fault.SHUFFLE) as found:
        execute(DIVERGED.format(limit=16, inside=shuffle), A)
    assert found.value.lanes == [(0, thread) for thread in range(16)]


def test_no_end(monkeypatch):
    monkeypatch.setattr(launch, 'VISITS', 1000)
    with pytest.raises(Fault, match=Fault.ENDLESS):
        execute('$L_again:\nadd.s32 %r4, %r1, 1;\nbra $L_again;', A)


def test_arguments_that_do_not_fit():
    with pytest.raises(Fault, match=Fault.ARGUMENTS):
        execute('', A, threads=48)
    with pytest.raises(Fault, match=Fault.ARGUMENTS):
        execute('', A, A, A)


@pytest.mark.parametrize(
    'line',
    [
        'frobnicate.sync.b32 %r4, %r1;', 'add.sat.f32 %r4, %r1, %r1;', 'ld.global.acquire.gpu.b32 %r4, [%d4];',
        'atom.global.add.u32 %r4, [%d4], 1;', 'mov.u32 %r4, %clock;', 'cvt.rz.f16.f32 %h1, %r1;', 'bar.sync 0, 64;',
        'shfl.up.b32 %r4, %r1, 16, 31;', 'setp.lt.bf16x2 %p1, %r1, %r2;', 'add.s32 %r4, %r1, somewhere;',
    ],
)  # fmt: skip
def test_unknown_instructions_are_named(line):
    with pytest.raises(UnknownInstruction) as found:
        execute(line, A)
    assert any(word in str(found.value) for word in (line.split()[0], '%clock', 'somewhere'))
