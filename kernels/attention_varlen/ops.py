"""``mimdet::attention_varlen`` of triton and aten_cpu, its backward, and the conditions of every implementation.

flash_attn, torch_varlen and sdpa are operations of their libraries, which define their gradients.
"""

from __future__ import annotations

import torch

from .. import dispatch, library
from ..dispatch import BF16, F16, F32, Implementation
from . import flash_attn

NAME = "attention_varlen"
# General names of implementations -> names here.
ALIASES = {"cuda": "torch_varlen", "cpp": "aten_cpu"}
# Widest heads for which our Triton kernel is the fastest, and widest that it takes.
_NARROW = 32
_WIDEST = 128


def _supports_triton(call):
    if call.head_dim > _WIDEST:
        return f"it takes head dims up to {_WIDEST}, got {call.head_dim} (use torch_varlen or eager)"
    return dispatch.supports_triton(call)


def _supports_varlen(call):
    # varlen_attn calls FlashAttention or cuDNN, which are 16-bit; float32 goes to sdpa, which needs equal lengths.
    kernels = "kernels of torch's varlen_attn"
    reason = dispatch.no_gpu(kernels, call.device, rocm=False)
    reason = reason or dispatch.too_old("torch's varlen_attn needs", call.device, "sdpa or eager")
    if reason is None and call.dtypes[0] == F32 and not call.equal_lengths:
        return "it takes float32 sequences of one length only, B * max_seqlen = T (use triton or eager)"
    return reason or _multiple_of_8(call)


def _supports_sdpa(call):
    if not call.equal_lengths:
        return "it takes sequences of one length, B * max_seqlen = T (use another, or eager)"
    # PyTorch's fused kernels for GPUs take these head dims; for others it may build the N x N matrix.
    return None if call.device.type == "cpu" else _multiple_of_8(call)


def _multiple_of_8(call):
    if call.head_dim % 8 == 0 and call.head_dim <= 256:
        return None
    return f"it takes head dims that are multiples of 8 up to 256, got {call.head_dim} (use triton or eager)"


IMPLEMENTATIONS = {
    "aten_cpu": Implementation(lambda call: dispatch.no_cpu(call.device), "CPU", (F32, BF16, F16)),
    "sdpa": Implementation(
        _supports_sdpa, "any", (F32, BF16, F16), "equal lengths; on a GPU head dims 8, 16, ... 256"
    ),
    "flash_attn": Implementation(flash_attn.supports, "NVIDIA GPU", (BF16, F16), "head dims 8, 16, ... 256"),
    "torch_varlen": Implementation(
        _supports_varlen, "NVIDIA GPU", (F32, BF16, F16), "head dims 8, 16, ... 256; float32: equal lengths"
    ),
    "triton": dispatch.TRITON._replace(supports=_supports_triton, limits=f"head dims up to {_WIDEST}"),
    "eager": dispatch.EAGER,
}  # fmt: skip


def _order(call):
    narrow = call.dtypes[0].itemsize == 2 and call.head_dim <= _NARROW
    return ("triton", *IMPLEMENTATIONS) if narrow else tuple(IMPLEMENTATIONS)


dispatch.register(NAME, IMPLEMENTATIONS, _order, ALIASES)


def _outputs(qkv, impl):
    total, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((total, heads, head_dim))
    if impl == "aten_cpu":  # memory layout of PyTorch's kernel
        return out, qkv.new_empty((total, heads), dtype=torch.float32).t()
    return out, qkv.new_empty((heads, total), dtype=torch.float32)


def _forward(qkv, cu_seqlens, max_seqlen, scale, impl):
    outputs = _outputs(qkv, impl)
    if qkv.numel() or impl == "aten_cpu":  # aten_cpu checks cu_seqlens
        qkv, cu_seqlens = library.rows(qkv), cu_seqlens.contiguous()
        library.launch(f"{NAME}_fwd", impl, qkv, cu_seqlens, max_seqlen, scale, *outputs)
    return outputs


def _fake_forward(qkv, cu_seqlens, max_seqlen, scale, impl):
    return _outputs(qkv, impl)


def _backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, impl):
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if qkv.numel():
        dout, qkv, cu_seqlens = library.rows(dout), library.rows(qkv), cu_seqlens.contiguous()
        library.launch(f"{NAME}_bwd", impl, dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, dqkv)
    return dqkv


def _fake_backward(dout, qkv, out, lse, cu_seqlens, max_seqlen, scale, impl):
    return qkv.new_empty(qkv.shape)


run = library.define(
    NAME,
    # lse (heads, T): base 2 of triton, base e of aten_cpu.
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale, str impl) -> (Tensor out, Tensor lse)",
    _forward,
    _fake_forward,
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, str impl)"
    " -> Tensor",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, _dlse):
    qkv, out, lse, cu_seqlens = ctx.saved_tensors
    dqkv = None
    if dout is not None:
        dqkv = run_backward(dout, qkv, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.impl)
    return dqkv, None, None, None, None


library.autograd(NAME, _differentiate, _setup_context)
