"""Softmax attention within each sequence of a packed batch."""

from __future__ import annotations

import contextlib
import math

import torch

from .. import checks, debug
from ..dispatch import resolve
from . import flash_attn, ops, reference, torch_attention


def attention_varlen_packed(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """``softmax(scale * q k^T) v`` within each sequence; tokens of different sequences never meet.

    Scores and sums are float32 (float64 for float64). Only eager builds the N x N matrix. Gradients of first order;
    of triton and aten_cpu they repeat bitwise.

    Values of ``impl`` beside auto, in auto's order; cuda means torch_varlen, cpp means aten_cpu:

    ============  ======================================================  ========================================
    aten_cpu      PyTorch's C++ attention, sequence by sequence; CPU      first on the CPU
    sdpa          PyTorch's dense attention; all lengths must be equal    equal lengths on a GPU
    flash_attn    flash-attn 2, 3 or 4 if installed; GPU, 16-bit          the second choice on a GPU
    torch_varlen  PyTorch's ``varlen_attn``; NVIDIA GPU; float32: sdpa    the third choice on a GPU
    triton        a kernel of our own; GPU, head dims up to 128           first for 16-bit head dims up to 32
    eager         plain PyTorch; any device and dtype                     float64, and where nothing else runs
    ============  ======================================================  ========================================

    Lengths are known to be equal, without waiting for the GPU, where B * max_seqlen is T. Source: Dao,
    "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.

    Args:
        qkv: (T, 3, heads, head_dim) float, T tokens of all sequences one after the other, the output of one
            linear layer; any strides, without a copy where head_dim is dense (and, for sdpa, flash_attn
            and torch_varlen, rows begin at multiples of 16 bytes).
        cu_seqlens: (B + 1,) int32 on qkv's device: where each sequence starts, and T. Sequences may be empty. Its
            values are checked on the CPU; on a GPU, where that would wait for it, only with MIMDET_DEBUG_KERNELS=1.
        max_seqlen: the longest length, or more.
        scale: of the scores, positive; None means head_dim ** -0.5.
        impl: see ``mimdet.kernels.dispatch``, and above.

    Returns:
        (T, heads, head_dim) in qkv's dtype.

    Raises:
        TypeError: dtypes that are not float or differ, cu_seqlens that is not int32, max_seqlen that is not an int,
            a scale that is not a number.
        ValueError: shapes or devices that do not fit together, more tokens than B * max_seqlen, a scale that is not
            positive; where they are checked, cu_seqlens that does not start at 0, descends, does not end at T or has
            a length above max_seqlen.
        KernelUnavailableError: ``impl`` names what cannot run or does not take this head dim or these lengths.
    """
    checks.tensors(ops.NAME, qkv=qkv)
    _check_shape("qkv", qkv, (3,))
    _check_rest(qkv, cu_seqlens, max_seqlen, scale)
    total, head_dim = qkv.shape[0], qkv.shape[-1]
    equal_lengths = False
    if (cu_seqlens.shape[0] - 1) * max_seqlen == total:
        equal_lengths = True
    impl = resolve(ops.NAME, impl, qkv.device, (qkv.dtype,), None, _number(head_dim), equal_lengths)
    kind = qkv.device.type
    on_cpu = impl != "aten_cpu" and kind == "cpu" and not torch.compiler.is_compiling()  # aten_cpu checks them itself
    check_values = on_cpu or (kind != "cpu" and debug.enabled())
    if check_values and type(cu_seqlens) is torch.Tensor:  # FakeTensor has no values
        debug.check_cu_seqlens(cu_seqlens, total, max_seqlen, ops.NAME)
    scale = head_dim**-0.5 if scale is None else scale
    if impl in ("triton", "aten_cpu"):
        return ops.run(qkv, cu_seqlens, max_seqlen, scale, impl)[0]
    if total == 0:
        return qkv.sum(1)  # empty, with a gradient
    if impl != "eager":
        qkv = torch_attention.loadable(qkv)
    if impl == "flash_attn":
        return flash_attn.attention(qkv, cu_seqlens.contiguous(), max_seqlen, scale)
    if impl == "torch_varlen" and qkv.dtype != torch.float32:
        return torch_attention.varlen(qkv, cu_seqlens.contiguous(), max_seqlen, scale)
    # Autocast would lower the precision of single steps inside these two.
    with torch.autocast(kind, enabled=False) if _has_autocast(kind) else contextlib.nullcontext():
        if impl == "eager":
            return reference.attention_varlen(*qkv.unbind(1), cu_seqlens, max_seqlen, scale)
        return torch_attention.sdpa(qkv, max_seqlen, scale)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """``attention_varlen_packed`` of q, k and v, each (T, heads, head_dim), copied into one tensor."""
    checks.tensors(ops.NAME, q=q, k=k, v=v)
    _check_shape("q", q, ())
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention_varlen: {name} must be {q.dtype} as q is, got {tensor.dtype}")
        if tensor.shape != q.shape:
            raise ValueError(f"attention_varlen: {name} must be {tuple(q.shape)} as q is, got {tuple(tensor.shape)}")
    qkv = torch.stack((q, k, v), dim=1)
    return attention_varlen_packed(qkv, cu_seqlens, max_seqlen, scale=scale, impl=impl)


def _number(size: int) -> int:
    """``size`` as an int: torch.compile's SymInt becomes a number with a guard."""
    if torch.compiler.is_compiling():
        for number in range(1, 1025):
            if number == size:
                return number
    return size


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _check_shape(name, tensor, middle) -> None:
    """``tensor`` must be (T, *middle, heads, head_dim)."""
    if tensor.dim() != 3 + len(middle) or tuple(tensor.shape[1:-2]) != middle or 0 in tensor.shape[-2:]:
        expected = ", ".join(["T", *map(str, middle), "heads", "head_dim"])
        raise ValueError(f"attention_varlen: {name} must be ({expected}), T alone may be 0, got {tuple(tensor.shape)}")


def _check_rest(qkv, cu_seqlens, max_seqlen, scale) -> None:
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(f"attention_varlen: cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"attention_varlen: cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"attention_varlen: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"attention_varlen: cu_seqlens is on {cu_seqlens.device}, qkv on {qkv.device}")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"attention_varlen: max_seqlen must be an int, got {type(max_seqlen).__name__}")
    if (cu_seqlens.shape[0] - 1) * max_seqlen < qkv.shape[0]:
        lengths = f"{cu_seqlens.shape[0] - 1} sequences of at most max_seqlen = {max_seqlen}"
        raise ValueError(f"attention_varlen: {qkv.shape[0]} tokens do not fit into {lengths}")
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"attention_varlen: scale must be a number, got {type(scale).__name__}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention_varlen: scale must be positive, got {scale}")
