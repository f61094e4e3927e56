"""PyTorch's own fused attention: dense, varlen on NVIDIA GPUs, and its C++ kernel on the CPU run by run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F

from .. import debug, registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def can_run_varlen(device: str, dtype: torch.dtype) -> str | None:
    """``varlen_attn`` runs FlashAttention or cuDNN, which have 16-bit kernels alone; float32 takes the dense one."""
    reason = registry.wrong_dtype("kernel of torch's varlen_attn", dtype, DTYPES)
    reason = reason or registry.no_gpu("kernels of torch's varlen_attn", device, rocm=False)
    if reason is None and torch.cuda.get_device_capability() < (8, 0):
        return "torch's varlen_attn needs a GPU of compute capability 8.0 or newer (use sdpa or eager)"
    return reason


def can_run_sdpa(device: str, dtype: torch.dtype) -> str | None:
    """Fused dense attention runs anywhere, in these dtypes; PyTorch builds the whole matrix for others."""
    return registry.wrong_dtype("fused dense attention", dtype, DTYPES)


def can_run_cpu(device: str, dtype: torch.dtype) -> str | None:
    """PyTorch's C++ attention needs CPU tensors."""
    return registry.wrong_dtype("C++ kernel", dtype, DTYPES) or registry.no_cpu(device)


def loadable(t: torch.Tensor) -> torch.Tensor:
    """``t`` (..., head_dim), copied where kernels could not load it 16 bytes at a time.

    Dense attention then quietly builds the whole matrix; others refuse, or crash. Inductor sees to offsets itself.
    """
    step = 16 // t.itemsize
    fits = t.stride(-1) == 1 and all(stride % step == 0 for stride in t.stride()[:-1])
    fits = fits and (torch.compiler.is_compiling() or t.storage_offset() % step == 0)
    return t if fits else t.clone(memory_format=torch.contiguous_format)


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> torch.Tensor:
    """torch's ``varlen_attn``, with the arguments that every PyTorch since 2.11 has."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, max_seqlen: int, scale: float) -> torch.Tensor:
    """``scaled_dot_product_attention`` of sequences that are all ``max_seqlen`` long."""
    dense = (t.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*dense, scale=scale).transpose(1, 2).flatten(0, 1)


def cpu_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out (T, heads, head_dim), and the logarithm of the softmax's sum (heads, T), strided as the kernel makes it."""
    bounds = debug.check_cu_seqlens(cu_seqlens, len(q), max_seqlen, "attention_varlen")
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    for run in _runs(bounds):
        made, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_dense(t, *run) for t in (q, k, v)), scale=scale
        )
        _dense(out, *run).copy_(made)
        _dense(lse, *run).copy_(sums)
    return out, lse.t()


def cpu_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    cu_seqlens: torch.Tensor, max_seqlen: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Gradients of q, k and v as (T, 3, heads, head_dim)."""
    bounds = debug.check_cu_seqlens(cu_seqlens, len(q), max_seqlen, "attention_varlen")
    grads = q.new_empty((q.shape[0], 3, *q.shape[1:]))
    for run in _runs(bounds):
        dense = (_dense(t, *run) for t in (grad, q, k, v, out, lse.t()))
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(*dense, 0.0, False, scale=scale)
        for into, part in zip(grads.unbind(1), made, strict=True):
            _dense(into, *run).copy_(part)
    return grads


def _runs(bounds: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, number of sequences, their length) of neighbours of equal length: one dense batch each."""
    first = 0
    for length, group in groupby(b - a for a, b in pairwise(bounds)):
        count = len(list(group))
        if length:
            yield first, count, length
        first += count * length


def _dense(t: torch.Tensor, first: int, count: int, length: int) -> torch.Tensor:
    """Tokens of a run as (count, heads, length, ...), without a copy."""
    return t[first : first + count * length].unflatten(0, (count, length)).transpose(1, 2)
