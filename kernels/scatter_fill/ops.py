"""``mimdet::scatter_fill``, and the split that is its backward."""

from __future__ import annotations

from .. import build, library, registry

NAME = "scatter_fill"

registry.register(NAME, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _run(kept, fill, restore, pos, impl):
    batch, length, channels = *restore.shape, kept.shape[2]
    out = kept.new_empty((batch, length, channels), dtype=pos.dtype)
    if out.numel() == 0:
        return out
    kept, fill = (t if t.stride(2) == 1 else t.contiguous() for t in (kept, fill))
    pos = pos.contiguous()
    if impl == "triton":
        from .triton import launch_scatter_fill_fwd

        launch_scatter_fill_fwd(kept, fill, restore.contiguous(), pos, out)
        return out
    restore = restore.long().contiguous()
    if impl == "cuda":
        codes = library.CUDA_DTYPES[kept.dtype], library.CUDA_DTYPES[out.dtype]
        strides = kept.stride(0), kept.stride(1), fill.stride(0), fill.stride(1)
        sizes = batch * length, kept.shape[1], length, channels
        build.call_cuda(NAME, kept, fill, restore, pos, out, *codes, *strides, *sizes)
    else:
        build.call_cpp(NAME, kept, fill, restore, pos, out)
    return out


def _fake(kept, fill, restore, pos, impl):
    return kept.new_empty((*restore.shape, kept.shape[2]), dtype=pos.dtype)


def _fake_backward(grad, restore, kept_rows, fill_rows, dtype, impl):
    batch, _length, channels = grad.shape
    return tuple(grad.new_empty((batch, n, channels), dtype=dtype) for n in (kept_rows, fill_rows))


def _run_backward(grad, restore, kept_rows, fill_rows, dtype, impl):
    kept, fill = _fake_backward(grad, restore, kept_rows, fill_rows, dtype, impl)
    if grad.numel() == 0:
        return kept, fill
    grad = grad.contiguous()
    if impl == "triton":
        from .triton import launch_scatter_fill_bwd

        launch_scatter_fill_bwd(grad, restore.contiguous(), kept, fill)
        return kept, fill
    restore = restore.long().contiguous()
    if impl == "cuda":
        codes = library.CUDA_DTYPES[grad.dtype], library.CUDA_DTYPES[dtype]
        batch, length, channels = grad.shape
        sizes = batch * length, kept_rows, fill_rows, length, channels
        build.call_cuda(f"{NAME}_backward", grad, restore, kept, fill, *codes, *sizes)
    else:
        build.call_cpp(f"{NAME}_backward", grad, restore, kept, fill)
    return kept, fill


run = library.define(NAME, "(Tensor kept, Tensor fill, Tensor restore, Tensor pos, str impl) -> Tensor", _run, _fake)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor restore, SymInt kept_rows, SymInt fill_rows, ScalarType dtype, str impl)"
    " -> (Tensor grad_kept, Tensor grad_fill)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    kept, fill, restore, _pos, ctx.impl = inputs
    ctx.rows, ctx.dtype = (kept.shape[1], fill.shape[1]), kept.dtype
    ctx.save_for_backward(restore)


def _backward(ctx, grad):
    (restore,) = ctx.saved_tensors
    grad_kept = grad_fill = grad_pos = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        grad_kept, grad_fill = run_backward(grad, restore, *ctx.rows, ctx.dtype, ctx.impl)
    if ctx.needs_input_grad[3]:
        if grad.shape[1] > sum(ctx.rows):  # there is padding
            grad = grad.masked_fill((restore < 0)[..., None], 0)
        grad_pos = grad.sum(0)
    return grad_kept, grad_fill, None, grad_pos, None


library.autograd(NAME, _backward, _setup_context)
