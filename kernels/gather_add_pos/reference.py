"""Gather of tokens with their position embedding, in plain PyTorch."""

from __future__ import annotations

import torch


def gather_add_pos(x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """``x[b, index[b, k]] + pos[index[b, k]]``.

    Args:
        x: (B, L, C) tokens.
        pos: (L, C) position embedding, or None for the tokens alone.
        index: (B, K) int32 or int64, rows of ``x``.

    Returns:
        (B, K, C) in the dtype of ``x + pos``.
    """
    batch, length, channels = x.shape
    flat = (index + length * torch.arange(batch, device=x.device)[:, None]).flatten()
    out = x.reshape(batch * length, channels).index_select(0, flat)
    if pos is not None:
        out = out + pos.index_select(0, index.flatten())
    return out.view(*index.shape, channels)


def gather_add_pos_backward(grad: torch.Tensor, index: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Gradient of the gathered tokens: ``out[b, index[b, k]] = grad[b, k]``, zero elsewhere.

    Args:
        grad: (B, K, C).
        index: (B, K) int32 or int64, unique within a row.
        length: L, rows of the result.
        dtype: the result's.

    Returns:
        (B, L, C) in ``dtype``.
    """
    batch, count, channels = grad.shape
    out = grad.new_zeros(batch, length, channels, dtype=dtype)
    flat = (index + length * torch.arange(batch, device=grad.device)[:, None]).flatten()
    out.view(batch * length, channels).index_copy_(0, flat, grad.reshape(batch * count, channels).to(dtype))
    return out
