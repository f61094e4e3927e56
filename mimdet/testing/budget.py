"""The error budget: how far a computation in float32 or 16 bits may be from the exact result.

A fixed tolerance is too wide for one shape and too narrow for another. The budget is relative to the error of plain
PyTorch in the same dtype; both errors are measured against plain PyTorch in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Added to twice the reference's error, in ulps of the largest magnitude.
_ULPS = 4


class Measurement(NamedTuple):
    """Error of one tensor.

    Attributes:
        name: of the tensor.
        error: largest difference from the exact result; the number of different elements of integers.
        budget: what it may be.
        reference_error: that of plain PyTorch in the same dtype; 0 of integers.
        ulp: unit in the last place of the dtype at the tensor's largest magnitude; 0 of integers.
    """

    name: str
    error: float
    budget: float
    reference_error: float
    ulp: float

    @property
    def ratio(self) -> float:
        """error / budget; infinite for any error without a budget."""
        return self.error / self.budget if self.budget else float("inf") if self.error else 0.0

    def check(self, where: str = "") -> None:
        """Raise AssertionError, naming ``where`` and the tensor, unless the error is within the budget."""
        name = f"{where}: {self.name}" if where else self.name
        if self.error > self.budget or self.error != self.error:
            kind = f"error {self.error:.3g}" if self.ulp else f"{self.error:.0f} elements differ, which is"
            raise AssertionError(f"{name}: {kind} above the budget {self.budget:.3g}")


def measure(
    actual: torch.Tensor,
    reference_same_dtype: torch.Tensor,
    reference_fp64: torch.Tensor,
    terms: int = 1,
    name: str = "actual",
) -> Measurement:
    """Error of ``actual`` and its budget, twice the reference's error and a few ulps; arguments as in
    ``assert_within_budget``.

    Returns:
        all 0.0 for empty tensors; an infinite error where ``actual`` is not finite.
    """
    exact = reference_fp64.cpu()
    if exact.numel() == 0:
        return Measurement(name, 0.0, 0.0, 0.0, 0.0)
    if not actual.is_floating_point():
        return Measurement(name, float((actual.cpu() != exact).sum()), 0.0, 0.0, 0.0)
    error, reference = ((t.double().cpu() - exact).abs().max().item() for t in (actual, reference_same_dtype))
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = 2 * reference + _ULPS * ulp * terms**0.5
    return Measurement(name, error if torch.isfinite(actual).all() else float("inf"), budget, reference, ulp)


def error_and_budget(
    actual: torch.Tensor, reference_same_dtype: torch.Tensor, reference_fp64: torch.Tensor, terms: int = 1
) -> tuple[float, float]:
    """The error and the budget of ``measure``."""
    return measure(actual, reference_same_dtype, reference_fp64, terms)[1:3]


def assert_same_kind(
    actual: torch.Tensor, reference_same_dtype: torch.Tensor, reference_fp64: torch.Tensor, name: str
) -> None:
    """Raise AssertionError, naming ``name``, unless shape and dtype are the references' and all is finite."""
    shape, dtype = reference_fp64.shape, reference_same_dtype.dtype
    assert actual.shape == shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(shape)}"
    assert actual.dtype == dtype, f"{name}: {actual.dtype}, expected {dtype}"
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} elements are not finite"


def assert_within_budget(
    actual: torch.Tensor,
    reference_same_dtype: torch.Tensor,
    reference_fp64: torch.Tensor,
    terms: int = 1,
    name: str = "actual",
) -> float:
    """Check shape, dtype, finiteness and error of ``actual``.

    Round inputs to the dtype before promoting them to float64, so that both references have the same inputs::

        x = torch.randn(8, 96, dtype=torch.bfloat16)
        assert_within_budget(my_gelu(x), F.gelu(x), F.gelu(x.double()))

    Args:
        actual: the tensor to check, on any device.
        reference_same_dtype: plain PyTorch in the dtype of ``actual``.
        reference_fp64: plain PyTorch in float64 from the same inputs.
        terms: numbers summed into one element, for gradients of parameters; the ulps grow with its square root.
        name: of the tensor, for the error.

    Returns:
        error / budget, at most 1.

    Raises:
        AssertionError: naming ``name``.
    """
    assert_same_kind(actual, reference_same_dtype, reference_fp64, name)
    result = measure(actual, reference_same_dtype, reference_fp64, terms, name)
    result.check()
    return result.ratio
