"""A kernel of attention's polynomial alone."""

import triton
import triton.language as tl

from mimdet.kernels.attention_varlen.triton import _exp2_by_fma


@triton.jit
def exp2_kernel(x, y, SIZE: tl.constexpr):  # noqa: N803
    """y = 2 ** x, both (SIZE,) float32."""
    offs = tl.arange(0, SIZE)
    tl.store(y + offs, _exp2_by_fma(tl.load(x + offs)))
