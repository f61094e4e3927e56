"""Attention over packed sequences in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

import torch


def attention_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """``softmax(scale * q k^T) v`` within each sequence, in float32 or wider; builds (B, heads, N, N).

    Sequences are padded to N = ``max_seqlen`` without looking at the lengths from the host.
    """
    token = torch.arange(q.shape[0], device=q.device, dtype=torch.int32)
    place = torch.arange(max_seqlen, device=q.device, dtype=torch.int32)
    first, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    absent = first + place >= end  # (B, N)
    index = torch.where(absent, 0, first + place)
    wide = torch.promote_types(q.dtype, torch.float32)
    padded = (t.to(wide)[index].masked_fill(absent[..., None, None], 0.0) for t in (q, k, v))
    q_rows, k_rows, v_rows = (t.transpose(1, 2) for t in padded)  # (B, heads, N, head_dim)
    # finfo.min, not -inf: a row without keys and its gradients stay finite.
    scores = (q_rows @ k_rows.mT * scale).masked_fill(absent[:, None, None], torch.finfo(wide).min)
    out = (scores.softmax(-1) @ v_rows).transpose(1, 2)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    return out[sequence, token - cu_seqlens[sequence]].to(q.dtype)
