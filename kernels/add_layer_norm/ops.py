"""``mimdet::add_layer_norm``: residual addition and LayerNorm as one operation, and its backward as another."""

from __future__ import annotations

import torch

from .. import build, library, registry

NAME = "add_layer_norm"
# The widest row that the GPU kernels hold in registers.
WIDEST = 8192
_MOST_PARTIALS = {"cpp": 64, "cuda": 1024}

registry.register(NAME, triton=registry.can_run_triton, cuda=registry.can_run_cuda, cpp=registry.can_run_cpp)


def _run(r, branch, scale, weight, bias, eps, dtype, impl):
    r, branch = r.contiguous(), None if branch is None else branch.contiguous()
    scale, weight, bias = None if scale is None else scale.contiguous(), weight.contiguous(), bias.contiguous()
    if impl == "triton":
        from .triton import launch_add_layer_norm_fwd

        return launch_add_layer_norm_fwd(r, branch, scale, weight, bias, eps, dtype)
    batch, length, channels = r.shape
    r_new = r.new_empty(0) if branch is None else torch.empty_like(r)
    y = torch.empty_like(r, dtype=dtype)
    mean, rstd = (torch.empty((batch, length), dtype=torch.float32, device=r.device) for _ in range(2))
    if r.numel() == 0:
        return r_new, y, mean, rstd
    tensors = (r, branch, scale, weight, bias, r_new, y, mean, rstd)
    if impl == "cpp":
        build.call_cpp("add_layer_norm_fwd", *tensors, eps)
    else:
        codes = [library.CUDA_DTYPES[t.dtype] for t in (r, r if branch is None else branch, y)]
        build.call_cuda("add_layer_norm_fwd", *tensors, batch * length, length, channels, eps, *codes)
    return r_new, y, mean, rstd


def _fake(r, branch, scale, weight, bias, eps, dtype, impl):
    statistics = r.new_empty(r.shape[:2], dtype=torch.float32)
    r_new = r.new_empty(0 if branch is None else r.shape)
    return r_new, r.new_empty(r.shape, dtype=dtype), statistics, torch.empty_like(statistics)


def _run_backward(grad_r_new, grad_y, r_new, mean, rstd, scale, weight, branch_dtype, impl):
    grad_r_new, scale = (None if t is None else t.contiguous() for t in (grad_r_new, scale))
    grad_y, r_new, weight = grad_y.contiguous(), r_new.contiguous(), weight.contiguous()
    if impl == "triton":
        from .triton import launch_add_layer_norm_bwd

        return launch_add_layer_norm_bwd(grad_r_new, grad_y, r_new, mean, rstd, scale, weight, branch_dtype)
    batch, length, channels = r_new.shape
    rows = batch * length
    grad_r = torch.empty_like(r_new)
    grad_branch = None if branch_dtype is None else torch.empty_like(r_new, dtype=branch_dtype)
    # How rows are shared out depends on their number alone: any number of threads sums in the same order.
    step = max(16, -(-rows // _MOST_PARTIALS[impl]))
    partial_w, partial_b = (
        torch.empty((-(-rows // step), channels), dtype=torch.float32, device=r_new.device) for _ in range(2)
    )
    if r_new.numel():
        tensors = (grad_r_new, grad_y, r_new, mean, rstd, scale, weight, grad_r, grad_branch, partial_w, partial_b)
        if impl == "cpp":
            build.call_cpp("add_layer_norm_bwd", *tensors, step)
        else:
            codes = [
                library.CUDA_DTYPES[t.dtype] for t in (r_new, r_new if grad_branch is None else grad_branch, grad_y)
            ]
            build.call_cuda("add_layer_norm_bwd", *tensors, rows, length, channels, step, *codes)
    grad_branch = r_new.new_empty(0) if grad_branch is None else grad_branch
    return grad_r, grad_branch, partial_w.sum(0), partial_b.sum(0)


def _fake_backward(grad_r_new, grad_y, r_new, mean, rstd, scale, weight, branch_dtype, impl):
    grad_branch = r_new.new_empty(0) if branch_dtype is None else r_new.new_empty(r_new.shape, dtype=branch_dtype)
    grad_weight = weight.new_empty(weight.shape)
    return r_new.new_empty(r_new.shape), grad_branch, grad_weight, torch.empty_like(grad_weight)


run = library.define(
    NAME,
    "(Tensor r, Tensor? branch, Tensor? scale, Tensor weight, Tensor bias, float eps, ScalarType dtype, str impl)"
    " -> (Tensor r_new, Tensor y, Tensor mean, Tensor rstd)",
    _run,
    _fake,
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor? grad_r_new, Tensor grad_y, Tensor r_new, Tensor mean, Tensor rstd, Tensor? scale, Tensor weight,"
    " ScalarType? branch_dtype, str impl)"
    " -> (Tensor grad_r, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)",
    _run_backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    r, branch, scale, weight, _bias, _eps, _dtype, ctx.impl = inputs
    r_new, _y, mean, rstd = output
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.save_for_backward(r if branch is None else r_new, mean, rstd, scale, weight)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_r_new, grad_y, _grad_mean, _grad_rstd):
    r_new, mean, rstd, scale, weight = ctx.saved_tensors
    has_branch = ctx.branch_dtype is not None
    grad_r = grad_r_new if has_branch else None
    grad_branch = grad_weight = grad_bias = None
    # Nothing scales the branch: its gradient is the residual's, and need not be written twice.
    shared = has_branch and scale is None and ctx.branch_dtype == r_new.dtype
    if grad_y is not None:
        branch_dtype = None if shared else ctx.branch_dtype
        grad_r, grad_branch, grad_weight, grad_bias = run_backward(
            grad_r, grad_y, r_new, mean, rstd, scale, weight, branch_dtype, ctx.impl
        )
    elif has_branch and grad_r is not None and not shared:
        grad_branch = (grad_r if scale is None else grad_r * scale.view(-1, 1, 1)).to(ctx.branch_dtype)
    if shared:
        grad_branch = grad_r
    return grad_r, grad_branch if has_branch else None, None, grad_weight, grad_bias, None, None, None


library.autograd(NAME, _backward, _setup_context)
