"""PyTorch's fused attention with its gradients: dense, and varlen on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def loadable(qkv: torch.Tensor) -> torch.Tensor:
    """``qkv`` (..., head_dim), copied where kernels could not load it 16 bytes at a time.

    Of such a tensor sdpa silently builds the N x N matrix; others raise or crash. Inductor aligns storage itself.
    """
    step = 16 // qkv.itemsize
    fits = qkv.stride(-1) == 1 and all(stride % step == 0 for stride in qkv.stride()[:-1])
    fits = fits and (torch.compiler.is_compiling() or qkv.storage_offset() % step == 0)
    return qkv if fits else qkv.clone(memory_format=torch.contiguous_format)


def varlen(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float) -> torch.Tensor:
    """torch's ``varlen_attn``, with the arguments that every PyTorch since 2.11 has."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _without_plans(varlen_attn, *qkv.unbind(1), *lengths, scale=scale)


def sdpa(qkv: torch.Tensor, max_seqlen: int, scale: float) -> torch.Tensor:
    """``scaled_dot_product_attention`` of sequences that are all ``max_seqlen`` long."""
    dense = (t.unflatten(0, (-1, max_seqlen)).transpose(1, 2) for t in qkv.unbind(1))
    return _without_plans(F.scaled_dot_product_attention, *dense, scale=scale).transpose(1, 2).flatten(0, 1)


def _without_plans(attention: Callable[..., torch.Tensor], *tensors, scale: float) -> torch.Tensor:
    """``attention`` without cuDNN's kernels, unless ``torch.backends.cudnn.benchmark`` says that shapes repeat.

    PyTorch prefers cuDNN on Hopper and Blackwell. cuDNN builds a plan, which stalls the step, for each new batch size
    and length, of varlen_attn for each new number of tokens: images of many sizes bring new ones for hours. The choice
    depends on no counter, so checkpointing repeats forward with the kernel that ran before. Backward follows forward.
    Compiled code keeps PyTorch's order.
    """
    if torch.compiler.is_compiling() or not torch.backends.cuda.cudnn_sdp_enabled() or torch.backends.cudnn.benchmark:
        return attention(*tensors, scale=scale)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return attention(*tensors, scale=scale)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
