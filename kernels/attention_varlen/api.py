"""Softmax attention within each sequence of a packed batch."""

from __future__ import annotations

import contextlib
import math

import torch

from .. import checks, debug, registry
from ..selector import KernelUnavailableError
from . import flash_attn, ops, reference, torch_attention

_FIRST_FOR_NARROW_HEADS = 32  # of this width or less our own Triton kernel goes before the others


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
    """``softmax(scale * q k^T) v`` within each sequence; tokens of different sequences never meet.

    Scores and sums are float32 (float64 for float64). Only eager builds the N x N matrix. Gradients of first order;
    of triton and cpp they repeat bitwise.

    What ``impl`` names, beside auto, which chooses by what is written in the last column:

    ==========  ======================================================  ==========================================
    triton      a kernel of our own; GPU, head dims up to 128           16-bit head dims up to 32; the fourth choice
    sdpa        PyTorch's dense attention; all lengths must be equal    equal lengths on a GPU
    flash_attn  flash-attn 2, 3 or 4 if installed; GPU, 16-bit          the second choice on a GPU
    cuda        PyTorch's ``varlen_attn``; NVIDIA GPU; float32: sdpa    the third choice on a GPU
    cpp         PyTorch's C++ attention, sequence by sequence; CPU      first on the CPU
    eager       plain PyTorch; any device and dtype                     float64, and where nothing else runs
    ==========  ======================================================  ==========================================

    Lengths are known to be equal, without waiting for the GPU, where B * max_seqlen is T. Source: Dao,
    "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", 2023.

    Args:
        q: (T, heads, head_dim) float, T tokens of all sequences one after the other; any strides, without a copy
            where head_dim lies densely (and, for sdpa, flash_attn and cuda, rows begin at multiples of 16 bytes).
        k: like q.
        v: like q.
        cu_seqlens: (B + 1,) int32 on q's device: where each sequence starts, and T. Sequences may be empty. Checked on
            the CPU; on a GPU, where looking means waiting, only with MIMDET_DEBUG_KERNELS=1.
        max_seqlen: the longest length, or more.
        scale: of the scores, positive; None means head_dim ** -0.5.
        impl: see ``mimdet.kernels.selector``, and above.

    Returns:
        (T, heads, head_dim) in q's dtype.

    Raises:
        TypeError: dtypes that are not float or differ, cu_seqlens that is not int32, max_seqlen that is not an int,
            a scale that is not a number.
        ValueError: shapes or devices that do not fit together, more tokens than B * max_seqlen, a scale that is not
            positive; where they are checked, cu_seqlens that does not start at 0, descends, does not end at T or has
            a length above max_seqlen.
        KernelUnavailableError: ``impl`` names what cannot run or does not take this head dim or these lengths.
    """
    checks.tensors(ops.NAME, q=q, k=k, v=v, cu_seqlens=cu_seqlens)
    _check_main("q", q, ())
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"attention_varlen: {name} must be {q.dtype} as q is, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"attention_varlen: {name} is on {tensor.device}, q on {q.device}")
        if tensor.shape != q.shape:
            raise ValueError(f"attention_varlen: {name} must be {tuple(q.shape)} as q is, got {tuple(tensor.shape)}")
    return _attention(q, k, v, cu_seqlens, max_seqlen, scale, impl)


def attention_varlen_packed(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """``attention_varlen`` of what one linear layer gives: qkv (T, 3, heads, head_dim) float, not copied.

    Of triton, cpp and flash-attn 2 the gradient comes in one piece as well; the rest is as there.
    """
    checks.tensors(ops.NAME, qkv=qkv, cu_seqlens=cu_seqlens)
    _check_main("qkv", qkv, (3,))
    return _attention(qkv, None, None, cu_seqlens, max_seqlen, scale, impl)


def _attention(q, k, v, cu_seqlens, max_seqlen, scale, impl) -> torch.Tensor:
    """q (T, 3, heads, head_dim) and no k, v, or all three (T, heads, head_dim)."""
    _check_rest(q, cu_seqlens, max_seqlen, scale)
    total, head_dim = q.shape[0], q.shape[-1]
    impl = _choose(impl, q, (cu_seqlens.shape[0] - 1) * max_seqlen == total)
    looking = debug.enabled() or (impl != "cpp" and q.device.type == "cpu" and not torch.compiler.is_compiling())
    if looking and type(cu_seqlens) is torch.Tensor:  # others, fake ones, have no values
        debug.check_cu_seqlens(cu_seqlens, total, max_seqlen, ops.NAME)
    scale = head_dim**-0.5 if scale is None else scale
    if impl in ("triton", "cpp"):
        return ops.run(q, k, v, cu_seqlens, max_seqlen, scale, impl)[0]
    if total == 0:
        return q.sum(1) if k is None else q + k + v  # nothing, but with their gradients
    if impl != "eager":
        q, k, v = (t if t is None else torch_attention.loadable(t) for t in (q, k, v))
    if impl == "flash_attn":
        return flash_attn.attention(q if k is None else (q, k, v), cu_seqlens.contiguous(), max_seqlen, scale)
    q, k, v = q.unbind(1) if k is None else (q, k, v)
    if impl == "cuda" and q.dtype != torch.float32:
        return torch_attention.varlen(q, k, v, cu_seqlens.contiguous(), max_seqlen, scale)
    # Autocast would take these two apart and lower their precision.
    kind = q.device.type
    with torch.autocast(kind, enabled=False) if _has_autocast(kind) else contextlib.nullcontext():
        if impl in ("sdpa", "cuda"):
            return torch_attention.sdpa(q, k, v, max_seqlen, scale)
        return reference.attention_varlen(q, k, v, cu_seqlens, max_seqlen, scale)


@torch.compiler.assume_constant_result
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _check_main(name, tensor, middle) -> None:
    """``tensor`` must be (T, *middle, heads, head_dim)."""
    if not tensor.is_floating_point():
        raise TypeError(f"attention_varlen: {name} must be of a float dtype, got {tensor.dtype}")
    if tensor.dim() != 3 + len(middle) or tuple(tensor.shape[1:-2]) != middle or 0 in tensor.shape[-2:]:
        wanted = ", ".join(["T", *map(str, middle), "heads", "head_dim"])
        raise ValueError(f"attention_varlen: {name} must be ({wanted}), T alone may be 0, got {tuple(tensor.shape)}")


def _check_rest(q, cu_seqlens, max_seqlen, scale) -> None:
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"attention_varlen: cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"attention_varlen: cu_seqlens must be (B + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"attention_varlen: cu_seqlens is on {cu_seqlens.device}, q on {q.device}")
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise TypeError(f"attention_varlen: max_seqlen must be an int, got {type(max_seqlen).__name__}")
    if (cu_seqlens.shape[0] - 1) * max_seqlen < q.shape[0]:
        lengths = f"{cu_seqlens.shape[0] - 1} sequences of at most max_seqlen = {max_seqlen}"
        raise ValueError(f"attention_varlen: {q.shape[0]} tokens do not fit into {lengths}")
    if scale is not None and not isinstance(scale, (int, float, torch.SymFloat)):
        raise TypeError(f"attention_varlen: scale must be a number, got {type(scale).__name__}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"attention_varlen: scale must be positive, got {scale}")


def _choose(impl: str | None, q: torch.Tensor, equal: bool) -> str:
    """The first that takes this head dim and these lengths; see the table of ``attention_varlen``."""
    device, head_dim = q.device.type, q.shape[-1]
    names = registry.candidates(ops.NAME, impl, device, q.dtype)
    if equal and "sdpa" in names:
        names = ("sdpa", *names)
    if q.dtype.itemsize == 2 and head_dim <= _FIRST_FOR_NARROW_HEADS and "triton" in names:
        names = ("triton", *names)
    for name in names:
        reason = _refusal(name, q, equal)
        if reason is None:
            return name
    able = registry.candidates(ops.NAME, "auto", device, q.dtype)
    others = [n for n in able if _refusal(n, q, equal) is None]
    raise KernelUnavailableError(f"attention_varlen: {names[-1]} takes {reason}. What can here: {', '.join(others)}.")


def _refusal(name: str, q: torch.Tensor, equal: bool) -> str | None:
    """What implementation ``name`` takes, if this is not it."""
    device, head_dim = q.device.type, q.shape[-1]
    if name == "cuda" and q.dtype == torch.float32 and not equal:
        return "float32 sequences of one length only, B * max_seqlen = T"
    if name == "sdpa" and not equal:
        return "sequences of one length, B * max_seqlen = T"
    if name == "triton" and head_dim > 128:
        return f"head dims up to 128, got {head_dim}"
    if name == "flash_attn" and head_dim not in flash_attn.head_dims():
        return f"head dims {', '.join(map(str, flash_attn.head_dims()))}, got {head_dim}"
    # Beyond these varlen_attn refuses, and on a GPU dense attention may build the whole matrix.
    if (name == "cuda" or (name == "sdpa" and device != "cpu")) and (head_dim % 8 or head_dim > 256):
        return f"head dims that are multiples of 8 up to 256, got {head_dim}"
    return None
