"""Kernels of Triton's tutorials give the right values: the machine is no mirror of this package's own kernels."""

import pytest
import torch

pytest.importorskip('triton', reason='Triton is not installed')
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from ptx.driver import machine  # noqa: E402

CAPABILITIES = (75, 80, 90, 100, 120)


@triton.jit
def add_kernel(x_ptr, y_ptr, output_ptr, n_elements, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(axis=0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(output_ptr + offsets, x + y, mask=mask)


@triton.jit
def softmax_kernel(output_ptr, input_ptr, row_stride, n_rows, n_cols, BLOCK_SIZE: tl.constexpr):
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0)):
        columns = tl.arange(0, BLOCK_SIZE)
        mask = columns < n_cols
        values = tl.load(input_ptr + row * row_stride + columns, mask=mask, other=-float('inf'))
        numerator = tl.exp(values - tl.max(values, axis=0))
        tl.store(output_ptr + row * row_stride + columns, numerator / tl.sum(numerator, axis=0), mask=mask)


@triton.jit
def layer_norm_kernel(X, Y, W, B, Mean, Rstd, stride, N, eps, BLOCK_SIZE: tl.constexpr):
    row = tl.program_id(0)
    Y += row * stride
    X += row * stride
    _mean = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for off in range(0, N, BLOCK_SIZE):
        cols = off + tl.arange(0, BLOCK_SIZE)
        _mean += tl.load(X + cols, mask=cols < N, other=0.0).to(tl.float32)
    mean = tl.sum(_mean, axis=0) / N
    _var = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
    for off in range(0, N, BLOCK_SIZE):
        cols = off + tl.arange(0, BLOCK_SIZE)
        x = tl.load(X + cols, mask=cols < N, other=0.0).to(tl.float32)
        x = tl.where(cols < N, x - mean, 0.0)
        _var += x * x
    rstd = 1 / tl.sqrt(tl.sum(_var, axis=0) / N + eps)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)
    for off in range(0, N, BLOCK_SIZE):
        cols = off + tl.arange(0, BLOCK_SIZE)
        mask = cols < N
        w = tl.load(W + cols, mask=mask)
        b = tl.load(B + cols, mask=mask)
        x = tl.load(X + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + cols, (x - mean) * rstd * w + b, mask=mask)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BLOCK_N)
    offs_m = (pid // num_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (pid % num_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
    b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=(offs_m[:, None] < M) & (k + offs_k[None, :] < K), other=0.0)
        b = tl.load(b_ptrs, mask=(k + offs_k[:, None] < K) & (offs_n[None, :] < N), other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    c_ptrs = c_ptr + offs_m[:, None] * stride_cm + offs_n[None, :] * stride_cn
    tl.store(c_ptrs, accumulator.to(c_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))


@triton.jit
def seeded_dropout_kernel(x_ptr, output_ptr, n_elements, p, seed, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(axis=0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = offsets < n_elements
    x = tl.load(x_ptr + offsets, mask=mask)
    keep = tl.rand(seed, offsets) > p
    tl.store(output_ptr + offsets, tl.where(keep, x / (1 - p), 0.0), mask=mask)


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_add(capability):
    x, y, out = torch.rand(98), torch.rand(98), torch.empty(98)
    with machine(capability):
        add_kernel[(2,)](x, y, out, 98, BLOCK_SIZE=64)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize('capability', CAPABILITIES)
def test_softmax(capability):
    x, out = torch.randn(7, 781), torch.empty(7, 781)
    with machine(capability):
        softmax_kernel[(3,)](out, x, x.stride(0), 7, 781, BLOCK_SIZE=1024, num_warps=8)
    torch.testing.assert_close(out, x.softmax(1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('dtype', (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_layer_norm(dtype):
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((5, 300), (300,), (300,)))
    out, mean, rstd = torch.empty_like(x), torch.empty(5), torch.empty(5)
    with machine():
        layer_norm_kernel[(5,)](x, out, weight, bias, mean, rstd, x.stride(0), 300, 1e-5, BLOCK_SIZE=256, num_warps=2)
    exact = torch.nn.functional.layer_norm(x.double(), (300,), weight.double(), bias.double())
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mean, x.float().mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('capability', (75, 80, 90, 120))
@pytest.mark.parametrize(
    'dtype, precision, instruction, allowed',
    [
        (torch.float32, 'ieee', 'fma.rn.f32', 1e-6),
        (torch.float32, 'tf32', 'tf32.tf32', 2e-3),
        (torch.float16, 'ieee', 'f16.f16', 1e-3),
        (torch.bfloat16, 'ieee', 'bf16.bf16', 1e-2),
    ],
    ids=('float32', 'tf32', 'float16', 'bfloat16'),
)
def test_matmul(dtype, precision, instruction, allowed, capability):
    if capability == 75 and (precision == 'tf32' or dtype == torch.bfloat16):
        pytest.skip('sm_75 multiplies no such matrices')
    m, n, k = 70, 50, 90
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)
    with machine(capability) as gpu:
        # One stage: no asynchronous copies. Tiles of 32 rows: mma, and not wgmma of four warps.
        matmul_kernel[(6,)](
            a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), BLOCK_M=32, BLOCK_N=32, BLOCK_K=32,
            PRECISION=precision, num_stages=1,
        )  # fmt: skip
        if capability > 75:  # for which this Triton multiplies lane by lane
            assert instruction in gpu.launches[0].compiled.asm['ptx']
    exact = a.double() @ b.double()
    assert ((c.double() - exact).abs().max() / exact.abs().max()) < allowed


def test_dropout():
    x, out, again = torch.ones(4000), torch.empty(4000), torch.empty(4000)
    with machine():
        for result in (out, again):
            seeded_dropout_kernel[(4,)](x, result, 4000, 0.3, 123, BLOCK_SIZE=1024)
    assert torch.equal(out, again) and set(out.unique().tolist()) == {0.0, (1 / torch.tensor(0.7)).item()}
    assert abs((out == 0).float().mean().item() - 0.3) < 0.03
    # philox4x32-10 with key (123, 0): its first number of the counters 0 ... 3999, by Python's integers.
    assert (out != 0).tolist() == [_philox(i, 123) > 0.3 for i in range(4000)]


def _philox(counter: int, seed: int) -> float:
    low, word = 0xFFFFFFFF, [counter, 0, 0, 0]
    key = [seed & low, seed >> 32]
    for _ in range(10):
        first, second = word[0] * 0xD2511F53, word[2] * 0xCD9E8D57
        word = [second >> 32 ^ word[1] ^ key[0], second & low, first >> 32 ^ word[3] ^ key[1], first & low]
        key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
    signed = word[0] - 2**32 if word[0] >> 31 else word[0]
    return (signed if signed >= 0 else -signed - 1) * 4.6566127342e-10
