"""The kernel that adds up what the programs of the backward kernel have found."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=['samples', 'channels', 'groups', 'sample_step'])
def add_partials_kernel(
    partial, rstd, grad_weight, grad_bias, grad_mean, grad_rstd, samples, channels, groups, sample_step,
    TAPS: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums of ``partial`` (samples, groups, taps, C, 4) over groups, of taps and bias also over samples.

    A program has four sums, neighbours in memory, of each of BLOCK channels. The last four of a channel are a tap's,
    the bias's, mean's and rstd's: 0 where backward_kernel was not asked for them. WEIGHT: else the others are not read.
    """
    FOURTHS: tl.constexpr = (TAPS + 3) // 4
    fourth = tl.program_id(0) % FOURTHS
    is_last = fourth == FOURTHS - 1
    channel = (tl.program_id(0) // FOURTHS * BLOCK + tl.arange(0, BLOCK))[:, None]
    one = tl.arange(0, 4)[None, :]
    t = 4 * fourth + one
    column = 4 * (fourth * channels + channel) + one
    here = channel < channels
    written = here if WEIGHT else here & is_last
    total = tl.zeros((BLOCK, 4), tl.float64)
    for n in range(samples):
        sums = tl.zeros((DEPTH, BLOCK, 4), tl.float64)
        for first in range(0, groups, DEPTH):
            group = first + tl.arange(0, DEPTH)[:, None, None]
            line = (n * groups + group).to(tl.int64) * channels * (TAPS + 3)
            valid = (group < groups) & written[None, :, :]
            sums += tl.load(partial + line + column[None, :, :], mask=valid, other=0.0).to(tl.float64)
        own = tl.sum(sums, 0)
        scaled = own * tl.load(rstd + n * sample_step + channel, mask=here, other=0.0).to(tl.float64)
        if is_last:
            at = n * channels + channel + 0 * one
            tl.store(grad_mean + at, -scaled.to(tl.float32), mask=here & (t == TAPS + 1))
            tl.store(grad_rstd + at, own.to(tl.float32), mask=here & (t == TAPS + 2))
        total += tl.where(t < TAPS, scaled, own)
    tl.store(grad_weight + channel * TAPS + t, total.to(tl.float32), mask=here & (t < TAPS))
    if is_last:
        tl.store(grad_bias + channel + 0 * one, total.to(tl.float32), mask=here & (t == TAPS))
