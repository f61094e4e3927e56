"""Residual addition with per-sample scale, and LayerNorm of the sum, in one pass."""

from __future__ import annotations

import torch

from .. import checks
from ..dispatch import resolve
from . import ops, reference


def add_layer_norm(
    residual: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``residual_out = residual + scale * x`` and ``y = LayerNorm(residual_out) * weight + bias``.

    The sum is rounded to the residual's dtype before it is normalized; statistics are float32 (float64 for float64).
    Gradients of first order, which repeat bitwise: rows are summed in one order, whatever the number of threads.
    Activation memory is residual_out, and a mean and rstd per row. Source: Ba et al., "Layer Normalization",
    2016; Huang et al., "Deep Networks with Stochastic Depth", 2016.

    Args:
        residual: (B, ..., C) residual stream, float; any strides.
        x: output of the branch, like residual, of any float dtype; None adds nothing.
        scale: (B,) float, factor of each sample's x (drop path: 0 or 1 / keep); no gradient. None means 1.
        weight: (C,) float.
        bias: (C,) float.
        eps: added to the variance.
        dtype: of y; None means the residual's. Under autocast: the dtype that the next layer computes in.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        residual_out (B, ..., C) in residual's dtype, residual itself if there is no x; y (B, ..., C).

    Raises:
        TypeError: an argument that is not of a float dtype.
        ValueError: shapes or devices that do not fit together, a scale without x or with a gradient.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    dtype = residual.dtype if dtype is None and isinstance(residual, torch.Tensor) else dtype
    _check(residual, x, scale, weight, bias, dtype)
    channels = residual.shape[-1]
    too_large = f"it takes at most {ops.WIDEST} channels, got {channels} (use eager)" if channels > ops.WIDEST else None
    dtypes = residual.dtype, residual.dtype if x is None else x.dtype, dtype
    impl = resolve(ops.NAME, impl, residual.device, dtypes, too_large)
    flat = residual
    if residual.dim() != 3:
        # Kernels take (B, N, C).
        rows = residual.shape[0], residual.shape[1:-1].numel(), channels
        flat, x = residual.reshape(rows), None if x is None else x.reshape(rows)
    if impl == "eager":
        residual_out, y = reference.add_layer_norm(flat, x, scale, weight, bias, eps, dtype)
    else:
        if scale is not None and scale.dtype != torch.float32:
            scale = scale.float()
        if weight.dtype != torch.float32 or bias.dtype != torch.float32:
            weight, bias = weight.float(), bias.float()
        residual_out, y, _, _ = ops.run(flat, x, scale, weight, bias, eps, dtype, impl)
    if flat is not residual:
        residual_out, y = residual_out if x is None else residual_out.view(residual.shape), y.view(residual.shape)
    return residual if x is None else residual_out, y


def _check(residual, x, scale, weight, bias, dtype) -> None:
    op = ops.NAME
    checks.tensors(op, ("x", "scale"), residual=residual, weight=weight, bias=bias, x=x, scale=scale)
    if not dtype.is_floating_point:
        raise TypeError(f"{op}: dtype must be a float dtype, got {dtype}")
    if residual.dim() < 2:
        raise ValueError(f"{op}: residual must be (B, ..., C), got {tuple(residual.shape)}")
    shape = residual.shape
    row = (shape[-1],)
    if (
        weight.shape != row
        or bias.shape != row
        or (x is not None and x.shape != shape)
        or (scale is not None and scale.shape != (shape[0],))
    ):
        expected = {"x": (x, shape), "scale": (scale, shape[:1]), "weight": (weight, row), "bias": (bias, row)}
        checks.shapes(op, f"residual {tuple(shape)}", expected)
    if scale is not None and x is None:
        raise ValueError(f"{op}: scale without an x to scale")
    if scale is not None and scale.requires_grad:
        raise ValueError(f"{op}: scale has no gradient; detach it, or multiply x with it")
