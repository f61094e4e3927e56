"""Exact GELU inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gelu(z):
    """z * Phi(z) in float32."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_derivative(z):
    """Phi(z) + z * phi(z) in float32."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
