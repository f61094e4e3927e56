"""``mimdet::gather_add_pos``, and the scatter that is its backward."""

from __future__ import annotations

from .. import build, library, registry

NAME = "gather_add_pos"

registry.register(NAME, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _run(x, pos, index, impl):
    batch, count, channels = *index.shape, x.shape[2]
    out = x.new_empty((batch, count, channels), dtype=x.dtype if pos is None else pos.dtype)
    if out.numel() == 0:
        return out
    x = x if x.stride(2) == 1 else x.contiguous()
    pos = None if pos is None else pos.contiguous()
    if impl == "triton":
        from .triton import launch_gather_add_pos_fwd

        launch_gather_add_pos_fwd(x, pos, index.contiguous(), out)
        return out
    index = index.long().contiguous()
    if impl == "cuda":
        codes = library.CUDA_DTYPES[x.dtype], library.CUDA_DTYPES[out.dtype]
        sizes = x.stride(0), x.stride(1), batch * count, count, channels
        build.call_cuda(NAME, x, pos, index, out, *codes, *sizes)
    else:
        build.call_cpp(NAME, x, pos, index, out)
    return out


def _fake(x, pos, index, impl):
    return x.new_empty((*index.shape, x.shape[2]), dtype=x.dtype if pos is None else pos.dtype)


def _run_backward(grad, index, length, dtype, impl):
    batch, count, channels = grad.shape
    shape = batch, length, channels
    grad = grad.contiguous()
    if impl == "cpp":
        out = grad.new_empty(shape, dtype=dtype)
        if out.numel():
            build.call_cpp(f"{NAME}_backward", grad, index.long().contiguous(), out)
        return out
    out = grad.new_zeros(shape, dtype=dtype)
    if grad.numel() == 0:
        return out
    if impl == "triton":
        from .triton import launch_gather_add_pos_bwd

        launch_gather_add_pos_bwd(grad, index.contiguous(), out)
    else:
        codes = library.CUDA_DTYPES[grad.dtype], library.CUDA_DTYPES[dtype]
        sizes = batch * count, count, length, channels
        build.call_cuda(f"{NAME}_backward", grad, index.long().contiguous(), out, *codes, *sizes)
    return out


def _fake_backward(grad, index, length, dtype, impl):
    return grad.new_empty((grad.shape[0], length, grad.shape[2]), dtype=dtype)


run = library.define(NAME, "(Tensor x, Tensor? pos, Tensor index, str impl) -> Tensor", _run, _fake)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor index, SymInt length, ScalarType dtype, str impl) -> Tensor",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, _pos, index, ctx.impl = inputs
    ctx.length, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(index)


def _backward(ctx, grad):
    (index,) = ctx.saved_tensors
    grad_x = grad_pos = None
    if ctx.needs_input_grad[0]:
        grad_x = run_backward(grad, index, ctx.length, ctx.dtype, ctx.impl)
    if ctx.needs_input_grad[1]:
        rows = grad_x
        if rows is None or ctx.dtype != grad.dtype:
            rows = run_backward(grad, index, ctx.length, grad.dtype, ctx.impl)
        grad_pos = rows.sum(0)
    return grad_x, grad_pos, None, None


library.autograd(NAME, _backward, _setup_context)
