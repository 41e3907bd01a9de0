"""The kernels of the operators of schemas.py for CUDA, in Triton.

Paper: Xu et al., arXiv 2011.14150, Algorithm 1. With ``d = x - mean``, x^ = rstd * d, taps w_j, g = dL/dy:

    y_i   = rstd * sum_j w_j d_(i+j) + bias          d is 0 off the map: zeros are padded in normalised space
    g^_i  = sum_j w_j g_(i-j)                        grad_x = rstd * g^
    gw_j  = rstd * sum_i g_i d_(i+j) = rstd * sum_i d_i g_(i-j)
    dL/dmean = -rstd * sum g^,  dL/drstd = sum g^ d

Both sums of the backward pass need g at the taps' places and d only at its own. So where the map itself is NaN or Inf
beside the border, more taps' gradients become NaN than by the first form (d times a padded zero of g).

Memory traffic, in maps: forward reads x (and the residual) and writes y; backward reads x and g and writes grad_x;
moments reads x; moments_backward reads grad and x and writes grad_x. A lane (thread) has four neighbouring columns of
one channel and streams the rows of a strip (lanes.py): each row that it loads serves the sums of K rows of outputs,
which are in registers, as are K rows of d in the backward pass; what its columns need of their neighbours comes from
L1. Lanes lie along the memory: NCHW has ``inner`` groups of columns of ``outer`` channels, loaded by vectors of the
four columns where width and address allow; channels_last has ``inner`` channels of ``outer`` groups of columns.

Equal bits on every run: sums are kept per lane in float32, joined per program, written as one row per program, and
added in float64 in a fixed order by a second kernel, without atomics; and no product is a term of a sum over lanes, as
where the compiler contracts it (fma), the lanes that store one sum to one place have different last bits of it, and the
hardware chooses.
"""

from bnet_mm.ops.triton.kernels.backward import backward_kernel
from bnet_mm.ops.triton.kernels.forward import forward_kernel
from bnet_mm.ops.triton.kernels.moments import (
    batch_statistics_kernel,
    join_moments_kernel,
    moments_backward_kernel,
    moments_kernel,
)
from bnet_mm.ops.triton.kernels.sums import add_partials_kernel

__all__ = [
    'add_partials_kernel',
    'backward_kernel',
    'batch_statistics_kernel',
    'forward_kernel',
    'join_moments_kernel',
    'moments_backward_kernel',
    'moments_kernel',
]
