"""The error budget: how far a computation in float32 or 16 bits may be from the exact result.

A fixed tolerance is too wide for one shape and too narrow for the next. The budget follows the numbers: the plain
PyTorch reference in the same dtype says what that dtype can do, and the reference in float64 what is exact.
"""

from __future__ import annotations

import torch

# Slack beside twice the reference's error, in units of the dtype's last place at the largest magnitude.
_ULPS = 4


def error_and_budget(
    actual: torch.Tensor, reference_same_dtype: torch.Tensor, reference_fp64: torch.Tensor, terms: int = 1
) -> tuple[float, float]:
    """Largest error of ``actual``, and what it may be: twice the reference's, and a few units in the last place.

    Args:
        actual: the tensor that is checked, on any device.
        reference_same_dtype: plain PyTorch in the dtype of ``actual``.
        reference_fp64: plain PyTorch in float64 from the same inputs.
        terms: numbers summed into one element, for gradients of parameters; the slack grows with its square root.

    Returns:
        both 0.0 for empty tensors; an infinite error where ``actual`` is not finite.
    """
    exact = reference_fp64.cpu()
    if exact.numel() == 0:
        return 0.0, 0.0
    error, reference = ((t.double().cpu() - exact).abs().max().item() for t in (actual, reference_same_dtype))
    slack = _ULPS * torch.finfo(actual.dtype).eps * exact.abs().max().item() * terms**0.5
    return error if torch.isfinite(actual).all() else float("inf"), 2 * reference + slack


def assert_within_budget(
    actual: torch.Tensor,
    reference_same_dtype: torch.Tensor,
    reference_fp64: torch.Tensor,
    terms: int = 1,
    name: str = "actual",
) -> float:
    """Check shape, dtype, finiteness and error of ``actual``; arguments as in ``error_and_budget``.

    Quantise inputs to the dtype first and promote them to float64 then, or the references differ by their inputs::

        x = torch.randn(8, 96, dtype=torch.bfloat16)
        assert_within_budget(my_gelu(x), F.gelu(x), F.gelu(x.double()))

    Returns:
        error / budget, at most 1.

    Raises:
        AssertionError: naming ``name``.
    """
    shape, dtype = reference_fp64.shape, reference_same_dtype.dtype
    assert actual.shape == shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(shape)}"
    assert actual.dtype == dtype, f"{name}: {actual.dtype}, expected {dtype}"
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} elements are not finite"
    error, budget = error_and_budget(actual, reference_same_dtype, reference_fp64, terms)
    assert error <= budget, f"{name}: error {error:.3g} above the budget {budget:.3g}"
    return error / budget if budget else 0.0
