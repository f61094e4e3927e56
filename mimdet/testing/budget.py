"""The error budget: how far a computation in float32 or 16 bits may be from the exact result.

A fixed tolerance is too wide for one shape and too narrow for another. The budget is relative to the error of plain
PyTorch in the same dtype; both errors are measured against plain PyTorch in float64.
"""

from __future__ import annotations

import torch

# Added to twice the reference's error, in ulps of the largest magnitude.
_ULPS = 4


def error_and_budget(
    actual: torch.Tensor, reference_same_dtype: torch.Tensor, reference_fp64: torch.Tensor, terms: int = 1
) -> tuple[float, float]:
    """Largest error of ``actual``, and its budget: twice the reference's error and a few ulps.

    Args:
        actual: the tensor to check, on any device.
        reference_same_dtype: plain PyTorch in the dtype of ``actual``.
        reference_fp64: plain PyTorch in float64 from the same inputs.
        terms: numbers summed into one element, for gradients of parameters; the ulps grow with its square root.

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

    Round inputs to the dtype before promoting them to float64, so that both references have the same inputs::

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
