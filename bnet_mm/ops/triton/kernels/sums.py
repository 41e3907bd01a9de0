"""The kernel that adds up what the programs of the backward kernel have found."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['samples', 'channels', 'groups', 'sample_step'])
def add_partials_kernel(
    partial, rstd, grad_weight, grad_bias, grad_mean, grad_rstd, samples, channels, groups, sample_step,
    TAPS: tl.constexpr, WEIGHT: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of ``partial`` (samples, groups, taps, C, 4) over groups, of taps and bias also over samples; or zeros."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = number // (TAPS + 3)
    t = number % (TAPS + 3)
    column = (t // 4 * channels + channel) * 4 + t % 4
    here = channel < channels
    wanted = here & (t == TAPS)
    if WEIGHT:
        wanted = wanted | here & (t < TAPS)
    if STATISTICS:
        wanted = wanted | here & (t > TAPS)
    total = tl.zeros((BLOCK,), tl.float64)
    for n in range(samples):
        sums = tl.zeros((DEPTH, BLOCK), tl.float64)
        for first in range(0, groups, DEPTH):
            group = first + tl.arange(0, DEPTH)[:, None]
            line = (n * groups + group).to(tl.int64) * channels * (TAPS + 3)
            valid = (group < groups) & wanted[None, :]
            sums += tl.load(partial + line + column[None, :], mask=valid, other=0.0).to(tl.float64)
        own = tl.sum(sums, 0)
        scaled = own * tl.load(rstd + n * sample_step + channel, mask=here, other=0.0).to(tl.float64)
        at = n * channels + channel
        tl.store(grad_mean + at, -scaled.to(tl.float32), mask=here & (t == TAPS + 1))
        tl.store(grad_rstd + at, own.to(tl.float32), mask=here & (t == TAPS + 2))
        total += tl.where(t < TAPS, scaled, own)
    tl.store(grad_weight + channel * TAPS + t, total.to(tl.float32), mask=here & (t < TAPS))
    tl.store(grad_bias + channel, total.to(tl.float32), mask=here & (t == TAPS))
