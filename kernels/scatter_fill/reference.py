"""Assembly of the decoder's input, in plain PyTorch."""

from __future__ import annotations

import torch


def scatter_fill(kept: torch.Tensor, fill: torch.Tensor, ids_restore: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """``cat([kept, fill], 1)[b, ids_restore[b, i]] + pos[i]``; zeros where ``ids_restore[b, i]`` is -1.

    Args:
        kept: (B, K, D) encoded rows.
        fill: (B, F, D) rows of the other positions.
        ids_restore: (B, L) int32 or int64; each row holds 0 .. K + F - 1 once, and -1 in the L - K - F places left.
        pos: (L, D) position embedding.

    Returns:
        (B, L, D) in the dtype of ``kept + pos``.
    """
    batch, _, channels = kept.shape
    sources = [kept, fill]
    padding = None
    if ids_restore.shape[1] > kept.shape[1] + fill.shape[1]:
        padding = ids_restore < 0
        ids_restore = ids_restore.masked_fill(padding, kept.shape[1] + fill.shape[1])
        sources.append(kept.new_zeros(batch, 1, channels))
    rows = torch.cat(sources, dim=1)
    flat = (ids_restore + rows.shape[1] * torch.arange(batch, device=kept.device)[:, None]).flatten()
    out = rows.flatten(0, 1).index_select(0, flat).view(*ids_restore.shape, channels) + pos
    return out if padding is None else out.masked_fill(padding[..., None], 0)
