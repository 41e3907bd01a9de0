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

    A lane has four sums of a channel, neighbours in memory. The last four are a tap's, the bias's, mean's and rstd's, 0
    where backward_kernel was not asked for them. WEIGHT: else the others are not read.
    """
    FOURTHS: tl.constexpr = (TAPS + 3) // 4
    number = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    channel = number // FOURTHS
    here = channel < channels
    one = tl.arange(0, 4)[None, :]
    t = number % FOURTHS * 4 + one
    at = (number % FOURTHS * channels + channel) * 4 + one
    is_mean = one == 2  # of the last four
    written = here if WEIGHT else here & (t >= TAPS - 1)
    total = tl.zeros((BLOCK, 4), tl.float64)
    for n in range(samples):
        sums = tl.zeros((DEPTH, BLOCK, 4), tl.float64)
        for first in range(0, groups, DEPTH):
            group = first + tl.arange(0, DEPTH)[:, None, None]
            line = (n * groups + group).to(tl.int64) * channels * (TAPS + 3)
            valid = (group < groups) & written[None, :, :]
            sums += tl.load(partial + line + at[None, :, :], mask=valid, other=0.0).to(tl.float64)
        own = tl.sum(sums, 0)
        scaled = own * tl.load(rstd + n * sample_step + channel, mask=here, other=0.0).to(tl.float64)
        place = n * channels + channel
        out = tl.where(is_mean, grad_mean + place, grad_rstd + place)
        tl.store(out, tl.where(is_mean, -scaled, own).to(tl.float32), mask=here & (t > TAPS))
        total += tl.where(t < TAPS, scaled, own)
    out = tl.where(t < TAPS, grad_weight + (channel * TAPS + t), grad_bias + channel)
    tl.store(out, total.to(tl.float32), mask=here & (t <= TAPS))
