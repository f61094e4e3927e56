"""Gather of tokens together with their position embedding."""

from __future__ import annotations

import torch

from .. import checks, debug
from ..dispatch import resolve
from . import ops, reference


def gather_add_pos(
    x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """``x[b, index[b, k]] + pos[index[b, k]]`` in one pass over the gathered rows.

    The sum is rounded once, so every implementation gives the same numbers. Backward writes each row's gradient
    into zeros, without atomics: it repeats bitwise. Gradients of first order.

    Args:
        x: (B, L, C) tokens, float; any strides, without a copy where C is dense.
        pos: (L, C) or (1, L, C) position embedding, float; None gathers alone.
        index: (B, K) int32 or int64, tokens of each image: within 0 .. L - 1, none twice; otherwise results
            and gradients are undefined. MIMDET_DEBUG_KERNELS=1 checks both. Packed tokens of several images come as one
            image: x (1, B * L, C), pos (B * L, C), index (1, T).
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (B, K, C) in the dtype of ``x + pos``.

    Raises:
        TypeError: a dtype that is not float, or an index that is not int32 or int64.
        ValueError: shapes or devices that do not fit together; while debugging, an index twice.
        IndexError: while debugging, an index outside of 0 .. L - 1 (from cpp always a RuntimeError).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    pos = _checked(x, pos, index)
    if debug.enabled():
        debug.check_unique_index(index, x.shape[1], "gather_add_pos: index")
    if pos is not None and pos.dtype != x.dtype:
        # Kernels take x in pos's dtype, or in a 16-bit dtype beside a float32 pos.
        wide = torch.promote_types(x.dtype, pos.dtype)
        pos = pos.to(wide)
        x = x if wide == torch.float32 else x.to(wide)
    impl = resolve(ops.NAME, impl, x.device, (x.dtype,))
    if impl == "eager":
        return reference.gather_add_pos(x, pos, index)
    return ops.run(x, pos, index, impl)


def _checked(x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """``pos`` as (L, C)."""
    checks.tensors(ops.NAME, ("pos",), x=x, pos=pos)
    checks.integers(ops.NAME, x, "x", index=index)
    if x.dim() != 3:
        raise ValueError(f"gather_add_pos: x must be (B, L, C), got {tuple(x.shape)}")
    if index.dim() != 2 or index.shape[0] != x.shape[0]:
        raise ValueError(f"gather_add_pos: index must be ({x.shape[0]}, K), got {tuple(index.shape)}")
    if pos is None:
        return None
    table = pos.squeeze(0) if pos.dim() == 3 else pos
    if table.shape != x.shape[1:]:
        raise ValueError(f"gather_add_pos: pos must be {tuple(x.shape[1:])}, got {tuple(pos.shape)}")
    return table
