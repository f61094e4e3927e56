"""``mimdet::attention_varlen``, which triton and cpp share, and its backward; and what can run where.

The other implementations (flash_attn, cuda, sdpa) are operations of their libraries, with gradients of their own.
"""

from __future__ import annotations

import torch

from .. import library, registry
from . import flash_attn, torch_attention

NAME = "attention_varlen"

registry.register(
    NAME,
    # On a GPU the ones that were written for it, the most specialised first; see api for what goes before them.
    order={"cuda": ("flash_attn", "cuda", "triton", "sdpa", "eager")},
    triton=registry.can_run_triton,
    flash_attn=flash_attn.can_run,
    cuda=torch_attention.can_run_varlen,
    sdpa=torch_attention.can_run_sdpa,
    cpp=torch_attention.can_run_cpu,
)


def _rows(q, k, v):
    """q, k, v (T, heads, head_dim), packed or not, with the last dimension dense."""
    q, k, v = q.unbind(1) if k is None else (q, k, v)
    return [t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v)]


def _run(q, k, v, cu_seqlens, max_seqlen, scale, impl):
    q, k, v = _rows(q, k, v)
    if impl == "cpp":
        return torch_attention.cpu_forward(q, k, v, cu_seqlens, max_seqlen, scale)
    from .triton import launch_attention_varlen_fwd

    return launch_attention_varlen_fwd(q, k, v, cu_seqlens.contiguous(), max_seqlen, scale)


def _fake(q, k, v, cu_seqlens, max_seqlen, scale, impl):
    total, heads, head_dim = q.shape[0], q.shape[-2], q.shape[-1]
    lse = torch.float32
    lse = q.new_empty((total, heads), dtype=lse).t() if impl == "cpp" else q.new_empty((heads, total), dtype=lse)
    return q.new_empty((total, heads, head_dim)), lse


def _run_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, impl):
    q, k, v = _rows(q, k, v)
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    if impl == "cpp":
        return torch_attention.cpu_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale)
    from .triton import launch_attention_varlen_bwd

    return launch_attention_varlen_bwd(grad, q, k, v, out, lse, cu_seqlens.contiguous(), max_seqlen, scale)


def _fake_backward(grad, q, k, v, out, lse, cu_seqlens, max_seqlen, scale, impl):
    return q.new_empty((q.shape[0], 3, q.shape[-2], q.shape[-1]))


run = library.define(
    NAME,
    # q is (T, 3, heads, head_dim) where k and v are None. lse, (heads, T), is in the base that impl's backward wants.
    "(Tensor q, Tensor? k, Tensor? v, Tensor cu_seqlens, SymInt max_seqlen, float scale, str impl)"
    " -> (Tensor out, Tensor lse)",
    _run,
    _fake,
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor q, Tensor? k, Tensor? v, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen,"
    " float scale, str impl) -> Tensor",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_lse):
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    made = run_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, ctx.scale, ctx.impl)
    # One buffer for the three: the gradient of a packed q, k, v needs no copy.
    return (made, None, None, *(None,) * 4) if k is None else (*made.unbind(1), *(None,) * 4)


library.autograd(NAME, _backward, _setup_context)
