"""Residual addition with per-sample scale, and LayerNorm of the sum, in one pass."""

from __future__ import annotations

import torch

from .. import checks, registry
from ..selector import KernelUnavailableError, requested
from . import ops, reference


def add_layer_norm(
    r: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    dtype: torch.dtype | None = None,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``r_new = r + scale * branch`` and ``y = LayerNorm(r_new) * weight + bias``.

    The sum is rounded to r's dtype, and normalised as rounded; statistics are float32 (float64 for float64).
    Gradients of first order; sums over rows have one order whatever the number of threads, so they repeat bitwise.
    Backward keeps r_new and a mean and a deviation for each row. Source: Ba et al., "Layer Normalization", 2016;
    Huang et al., "Deep Networks with Stochastic Depth", 2016.

    Args:
        r: (B, ..., C) residual stream, float; any strides.
        branch: like r, of any float dtype; None adds nothing.
        scale: (B,) float, what each sample's branch is multiplied with (drop path: 0 or 1 / keep); no gradient.
            None means 1.
        weight: (C,) float.
        bias: (C,) float.
        eps: added to the variance.
        dtype: of y; None means r's. Under autocast give what the next layer computes in.
        impl: see ``mimdet.kernels.selector``.

    Returns:
        r_new (B, ..., C) in r's dtype, r itself if there is no branch; y (B, ..., C).

    Raises:
        TypeError: an argument that is not of a float dtype.
        ValueError: shapes or devices that do not fit together, a scale without a branch or with a gradient.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    checks.tensors(ops.NAME, r=r, weight=weight, bias=bias, branch=branch, scale=scale, optional=("branch", "scale"))
    dtype = r.dtype if dtype is None else dtype
    _check(r, branch, scale, weight, bias, dtype)
    impl = _choose(impl, r, branch, dtype)
    shape = r.shape
    # (B, N, C): what stands between the first and the last dimension is one.
    flat, branch = (t if t is None or t.dim() == 3 else t.reshape(*_rows(shape)) for t in (r, branch))
    if impl == "eager":
        r_new, y = reference.add_layer_norm(flat, branch, scale, weight, bias, eps, dtype)
    else:
        scale, weight, bias = (t if t is None or t.dtype == torch.float32 else t.float() for t in (scale, weight, bias))
        r_new, y, _, _ = ops.run(flat, branch, scale, weight, bias, eps, dtype, impl)
    if flat is not r:
        r_new, y = r_new if branch is None else r_new.view(shape), y.view(shape)
    return r if branch is None else r_new, y


def _rows(shape: torch.Size) -> tuple[int, int, int]:
    return shape[0], shape[1:-1].numel(), shape[-1]


def _check(r, branch, scale, weight, bias, dtype) -> None:
    given = {"branch": branch, "scale": scale, "weight": weight, "bias": bias}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in {"r": r, **given}.items():
        if not tensor.is_floating_point():
            raise TypeError(f"add_layer_norm: {name} must be of a float dtype, got {tensor.dtype}")
        if tensor.device != r.device:
            raise ValueError(f"add_layer_norm: {name} is on {tensor.device}, r on {r.device}")
    if not dtype.is_floating_point:
        raise TypeError(f"add_layer_norm: dtype must be a float dtype, got {dtype}")
    if r.dim() < 2:
        raise ValueError(f"add_layer_norm: r must be (B, ..., C), got {tuple(r.shape)}")
    wanted = {"branch": r.shape, "scale": r.shape[:1], "weight": r.shape[-1:], "bias": r.shape[-1:]}
    for name, tensor in given.items():
        if tensor.shape != wanted[name]:
            shapes = f"{tuple(wanted[name])} for r {tuple(r.shape)}, got {tuple(tensor.shape)}"
            raise ValueError(f"add_layer_norm: {name} must be {shapes}")
    if scale is not None and branch is None:
        raise ValueError("add_layer_norm: scale without a branch to scale")
    if scale is not None and scale.requires_grad:
        raise ValueError("add_layer_norm: scale has no gradient; detach it, or multiply the branch with it")


def _choose(impl: str | None, r: torch.Tensor, branch: torch.Tensor | None, dtype: torch.dtype) -> str:
    """One implementation that takes all the dtypes."""
    dtypes = {r.dtype, r.dtype if branch is None else branch.dtype, dtype}
    words = {registry.choose(ops.NAME, impl, r.device.type, d) for d in dtypes}
    chosen = words.pop() if len(words) == 1 else "eager"
    reason = None
    if chosen in ("triton", "cuda") and r.shape[-1] > ops.WIDEST:
        reason = f"rows of at most {ops.WIDEST} channels, got {r.shape[-1]}"
    elif chosen == "cuda":
        narrow = [d for d in dtypes if d != torch.float32]
        if len(narrow) > 1 or (r.dtype in narrow and len(dtypes) > 1):
            reason = f"one dtype for all, or a float32 r beside one 16-bit dtype, got {', '.join(map(str, dtypes))}"
    if reason is None:
        return chosen
    if requested(impl) == "auto":
        return "eager"
    raise KernelUnavailableError(f"add_layer_norm: {chosen} takes {reason}. auto would choose what can.")
