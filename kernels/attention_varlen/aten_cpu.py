"""PyTorch's C++ attention for the CPU, over runs of neighboring sequences that have one length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch

from .. import debug


def launch_attention_varlen_fwd(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """qkv (T, 3, heads, head_dim) -> out (T, heads, head_dim), and the log of the softmax's sum lse (heads, T)."""
    for run in _runs(qkv, cu_seqlens, max_seqlen):
        run_out, run_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_dense(t, *run) for t in qkv.unbind(1)), scale=scale
        )
        _dense(out, *run).copy_(run_out)
        _dense(lse.t(), *run).copy_(run_lse)


def launch_attention_varlen_bwd(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, cu_seqlens: torch.Tensor,
    max_seqlen: int, scale: float, dqkv: torch.Tensor,
) -> None:  # fmt: skip
    """dout (T, heads, head_dim), and forward's inputs and outputs -> dqkv (T, 3, heads, head_dim)."""
    for run in _runs(qkv, cu_seqlens, max_seqlen):
        dense = (_dense(t, *run) for t in (dout, *qkv.unbind(1), out, lse.t()))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*dense, 0.0, False, scale=scale)
        for to, grad in zip(dqkv.unbind(1), grads, strict=True):
            _dense(to, *run).copy_(grad)


def _runs(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> Iterator[tuple[int, int, int]]:
    """(first token, number of sequences, their length) of neighbors of equal length: one dense batch each."""
    first = 0
    bounds = debug.check_cu_seqlens(cu_seqlens, len(qkv), max_seqlen, "attention_varlen")
    for length, group in groupby(end - start for start, end in pairwise(bounds)):
        count = len(list(group))
        if length:
            yield first, count, length
        first += count * length


def _dense(t: torch.Tensor, first: int, count: int, length: int) -> torch.Tensor:
    """Tokens of a run as (count, heads, length, ...), without a copy."""
    return t[first : first + count * length].unflatten(0, (count, length)).transpose(1, 2)
