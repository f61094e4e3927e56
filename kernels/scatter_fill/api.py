"""Assembly of the decoder's input from encoded and filled rows."""

from __future__ import annotations

import torch

from .. import checks, debug
from ..dispatch import resolve
from . import ops, reference


def scatter_fill(
    kept: torch.Tensor, fill: torch.Tensor, ids_restore: torch.Tensor, pos: torch.Tensor, *, impl: str | None = None
) -> torch.Tensor:
    """``cat([kept, fill], 1)[b, ids_restore[b, i]] + pos[i]`` in one pass, without the concatenation; padding is zeros.

    The sum is rounded once, so every implementation gives the same numbers. Backward copies each row's gradient to
    its source row, without atomics: it repeats bitwise. Gradients of first order. Source: He et al.,
    "Masked Autoencoders Are Scalable Vision Learners", 2022 (the decoder's input).

    Args:
        kept: (B, K, D) encoded rows, float; any strides, without a copy where D is dense.
        fill: (B, F, D) rows of the other positions, in kept's dtype. One mask token for all of them is
            ``token.expand(B, F, D)``; it is not materialised.
        ids_restore: (B, L) int32 or int64, for each position its row in ``cat([kept, fill], 1)``. Every row occurs
            once; the other L - K - F positions are padding and hold -1: zeros in the result, no gradient. Otherwise
            results and gradients are undefined; MIMDET_DEBUG_KERNELS=1 checks it. Packed rows of several images come as
            one image: kept (1, T, D), fill (1, F, D), ids_restore (1, B * L), pos (B * L, D).
        pos: (L, D) or (1, L, D) position embedding, float.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (B, L, D) in the dtype of ``kept + pos``.

    Raises:
        TypeError: a dtype that is not float or differs, or an ids_restore that is not int32 or int64.
        ValueError: shapes or devices that do not fit together; while debugging, a row twice or padding too often.
        IndexError: while debugging, a row outside of 0 .. K + F - 1 (from cpp always a RuntimeError).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    pos = _checked(kept, fill, ids_restore, pos)
    if debug.enabled():
        rows = kept.shape[1] + fill.shape[1]
        debug.check_unique_index(ids_restore, rows, "scatter_fill: ids_restore", padding=ids_restore.shape[1] - rows)
    # Kernels take the rows in pos's dtype, or in a 16-bit dtype beside a float32 pos.
    if pos.dtype != kept.dtype:
        wide = torch.promote_types(kept.dtype, pos.dtype)
        pos = pos.to(wide)
        if wide != torch.float32:
            kept, fill = kept.to(wide), fill.to(wide)
    impl = resolve(ops.NAME, impl, kept.device, (kept.dtype,))
    if impl == "eager":
        return reference.scatter_fill(kept, fill, ids_restore, pos)
    return ops.run(kept, fill, ids_restore, pos, impl)


def _checked(kept: torch.Tensor, fill: torch.Tensor, ids_restore: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """``pos`` as (L, D)."""
    checks.tensors(ops.NAME, kept=kept, fill=fill, pos=pos)
    checks.integers(ops.NAME, kept, "kept", ids_restore=ids_restore)
    if fill.dtype != kept.dtype:
        raise TypeError(f"scatter_fill: kept and fill must have one dtype, got {kept.dtype} and {fill.dtype}")
    if kept.dim() != 3:
        raise ValueError(f"scatter_fill: kept must be (B, K, D), got {tuple(kept.shape)}")
    batch, count, channels = kept.shape
    if fill.dim() != 3 or fill.shape[0] != batch or fill.shape[2] != channels:
        raise ValueError(f"scatter_fill: fill must be ({batch}, F, {channels}), got {tuple(fill.shape)}")
    rows = count + fill.shape[1]
    if ids_restore.dim() != 2 or ids_restore.shape[0] != batch or ids_restore.shape[1] < rows:
        raise ValueError(f"scatter_fill: ids_restore must be ({batch}, {rows} or more), got {tuple(ids_restore.shape)}")
    length = ids_restore.shape[1]
    table = pos.squeeze(0) if pos.dim() == 3 else pos
    if table.shape != (length, channels):
        raise ValueError(f"scatter_fill: pos must be {(length, channels)}, got {tuple(pos.shape)}")
    return table
