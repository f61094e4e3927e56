"""``mimdet::bias_gelu``: bias and exact GELU as one operation, and its backward as another."""

from __future__ import annotations

import torch

from .. import build, library, registry

NAME = "bias_gelu"
_MOST_PARTIALS = {"cpp": 64, "cuda": 1024}

registry.register(NAME, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _run(x, bias, impl):
    x, bias = x.contiguous(), bias.contiguous()
    if impl == "triton":
        from .triton import launch_bias_gelu_fwd

        return launch_bias_gelu_fwd(x, bias)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if impl == "cpp":
        build.call_cpp("bias_gelu_fwd", x, bias, y)
    else:
        build.call_cuda("bias_gelu_fwd", x, bias, y, *x.shape, library.CUDA_DTYPES[x.dtype])
    return y


def _run_backward(grad_y, x, bias, impl):
    grad_y, x, bias = grad_y.contiguous(), x.contiguous(), bias.contiguous()
    if impl == "triton":
        from .triton import launch_bias_gelu_bwd

        return launch_bias_gelu_bwd(grad_y, x, bias)
    rows, channels = x.shape
    grad_x = torch.empty_like(x)
    # How rows are shared out depends on their number alone: any number of threads sums in the same order.
    step = max(16, -(-rows // _MOST_PARTIALS[impl]))
    partial = torch.empty((-(-rows // step), channels), dtype=torch.float32, device=x.device)
    if x.numel():
        if impl == "cpp":
            build.call_cpp("bias_gelu_bwd", grad_y, x, bias, grad_x, partial, step)
        else:
            code = library.CUDA_DTYPES[x.dtype]
            build.call_cuda("bias_gelu_bwd", grad_y, x, bias, grad_x, partial, rows, channels, step, code)
    return grad_x, partial.sum(0)


run = library.define(
    NAME, "(Tensor x, Tensor bias, str impl) -> Tensor", _run, lambda x, bias, impl: x.new_empty(x.shape)
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor grad_y, Tensor x, Tensor bias, str impl) -> (Tensor grad_x, Tensor grad_bias)",
    _run_backward,
    lambda grad_y, x, bias, impl: (x.new_empty(x.shape), bias.new_empty(bias.shape)),
)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad_y):
    return *run_backward(grad_y, *ctx.saved_tensors, ctx.impl), None


library.autograd(NAME, _backward, _setup_context)
