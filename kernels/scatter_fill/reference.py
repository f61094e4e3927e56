"""Assembly of the decoder's input, in plain PyTorch."""

from __future__ import annotations

import torch


def scatter_fill(kept: torch.Tensor, fill: torch.Tensor, restore: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """``cat([kept, fill], 1)[b, restore[b, i]] + pos[i]``; zeros where ``restore[b, i]`` is -1.

    Args:
        kept: (B, K, D) encoded rows.
        fill: (B, F, D) rows of the other positions.
        restore: (B, L) int32 or int64; each row holds 0 .. K + F - 1 once, and -1 in the L - K - F places left.
        pos: (L, D) position embedding.

    Returns:
        (B, L, D) in the dtype of ``kept + pos``.
    """
    batch, _, channels = kept.shape
    sources = [kept, fill]
    padding = None
    if restore.shape[1] > kept.shape[1] + fill.shape[1]:
        padding = restore < 0
        restore = restore.masked_fill(padding, kept.shape[1] + fill.shape[1])
        sources.append(kept.new_zeros(batch, 1, channels))
    rows = torch.cat(sources, dim=1)
    flat = (restore + rows.shape[1] * torch.arange(batch, device=kept.device)[:, None]).flatten()
    out = rows.flatten(0, 1).index_select(0, flat).view(*restore.shape, channels) + pos
    return out if padding is None else out.masked_fill(padding[..., None], 0)


def scatter_fill_backward(
    grad: torch.Tensor, restore: torch.Tensor, kept_rows: int, fill_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both sources: row ``restore[b, i]`` of ``cat([kept, fill], 1)`` receives ``grad[b, i]``.

    Args:
        grad: (B, L, D).
        restore: (B, L) int32 or int64, as above.
        kept_rows, fill_rows: K and F.
        dtype: the results'.

    Returns:
        (B, K, D) and (B, F, D) in ``dtype``.
    """
    batch, _, channels = grad.shape
    count = kept_rows + fill_rows
    rows = grad.new_empty(batch, count + 1, channels, dtype=dtype)  # the last row takes what padding got
    index = restore.masked_fill(restore < 0, count) + (count + 1) * torch.arange(batch, device=grad.device)[:, None]
    rows.view(-1, channels).index_copy_(0, index.flatten(), grad.reshape(-1, channels).to(dtype))
    return rows[:, :kept_rows].contiguous(), rows[:, kept_rows:count].contiguous()
