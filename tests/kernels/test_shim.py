"""conftest's patches of Triton's interpreter: without them these fail."""

import pytest
import torch
from support.kernels import INTERPRETED

if not INTERPRETED:
    pytest.skip("the interpreter has a process of its own", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def _sum_kernel(x, y, n):
    """y[0] = the sum of n floats at x, one by one."""
    total = 0.0
    for i in range(n):
        total += tl.load(x + i)
    tl.store(y, total)


@triton.jit
def _round_kernel(x, y, n: tl.constexpr):
    """y (n,) bfloat16 = x (n,) float32."""
    i = tl.arange(0, n)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_range_over_a_runtime_bound(interpreter):
    x, y = torch.arange(5.0), torch.zeros(1)
    _sum_kernel[(1,)](x, y, 5)
    assert y.item() == 10.0


def test_bfloat16_rounds_to_nearest_even(interpreter):
    x = torch.randn(1024)
    x[0], x[1] = float("nan"), float("inf")
    y = torch.zeros(1024, dtype=torch.bfloat16)
    _round_kernel[(1,)](x, y, 1024)
    assert torch.equal(y.nan_to_num(), x.bfloat16().nan_to_num())
    assert y[0].isnan()
