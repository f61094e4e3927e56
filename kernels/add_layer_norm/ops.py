"""``mimdet::add_layer_norm``: residual addition and LayerNorm as one operation, and its backward as another."""

from __future__ import annotations

import torch

from .. import dispatch, library

NAME = "add_layer_norm"
# Widest row that fits into the GPU kernels' registers.
WIDEST = 8192
_DENSE = torch.contiguous_format
# Rows per partial sum of the parameters' gradients at least, and partial sums at most. Triton: up to 1024 channels, 6
# programs fit on each of the 132 multiprocessors of an H100 or H200.
_PARTIALS = {"triton": (1, 792), "cuda": (16, 1024), "cpp": (16, 64)}


def _supports_cuda(call):
    residual, *others = call.dtypes
    narrow = {dtype for dtype in call.dtypes if dtype != torch.float32}
    if len(narrow) > 1 or (residual in narrow and any(dtype != residual for dtype in others)):
        dtypes = ", ".join(map(dispatch.dtype_name, call.dtypes))
        return f"it takes one dtype for all, or a float32 residual beside one 16-bit dtype, got {dtypes} (use eager)"
    return dispatch.supports_cuda(call)


dispatch.register(NAME, dispatch.standard(f"at most {WIDEST} channels", cuda=_supports_cuda))


def _outputs(residual, x, dtype):
    residual_out = residual.new_empty(0) if x is None else torch.empty_like(residual, memory_format=_DENSE)
    y = torch.empty_like(residual, dtype=dtype, memory_format=_DENSE)
    mean = residual.new_empty(residual.shape[:2], dtype=torch.float32)
    return residual_out, y, mean, torch.empty_like(mean)


def _forward(residual, x, scale, weight, bias, eps, dtype, impl):
    residual, x, scale, weight, bias = library.dense(residual, x, scale, weight, bias)
    outputs = _outputs(residual, x, dtype)
    if residual.numel():
        batch, length, channels = residual.shape
        library.launch(
            f"{NAME}_fwd", impl, residual, x, scale, weight, bias, eps, *outputs,
            sizes=(batch * length, length, channels), typed=(residual, residual if x is None else x, outputs[1]),
        )  # fmt: skip
    return outputs


def _fake_forward(residual, x, scale, weight, bias, eps, dtype, impl):
    return _outputs(residual, x, dtype)


def _backward(dresidual_out, dy, residual_out, mean, rstd, scale, weight, x_dtype, impl):
    dresidual_out, dy, residual_out, scale, weight = library.dense(dresidual_out, dy, residual_out, scale, weight)
    batch, length, channels = residual_out.shape
    rows = batch * length
    dresidual, dx = _gradients(residual_out, x_dtype)
    step = library.rows_per_partial(rows, *_PARTIALS[impl])
    partials = mean.new_empty((2, -(-rows // step), channels))
    if residual_out.numel():
        library.launch(
            f"{NAME}_bwd", impl, dresidual_out, dy, residual_out, mean, rstd, scale, weight, step,
            dresidual, None if x_dtype is None else dx, partials,
            sizes=(rows, length, channels), typed=(residual_out, residual_out if x_dtype is None else dx, dy),
        )  # fmt: skip
    return dresidual, dx, partials.sum(1)


def _gradients(residual_out, x_dtype):
    dresidual = torch.empty_like(residual_out, memory_format=_DENSE)
    if x_dtype is None:
        return dresidual, residual_out.new_empty(0)
    return dresidual, torch.empty_like(residual_out, dtype=x_dtype, memory_format=_DENSE)


def _fake_backward(dresidual_out, dy, residual_out, mean, rstd, scale, weight, x_dtype, impl):
    return *_gradients(residual_out, x_dtype), weight.new_empty((2, *weight.shape))


run = library.define(
    NAME,
    "(Tensor residual, Tensor? x, Tensor? scale, Tensor weight, Tensor bias, float eps, ScalarType dtype, str impl)"
    " -> (Tensor residual_out, Tensor y, Tensor mean, Tensor rstd)",
    _forward,
    _fake_forward,
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor? dresidual_out, Tensor dy, Tensor residual_out, Tensor mean, Tensor rstd, Tensor? scale, Tensor weight,"
    " ScalarType? x_dtype, str impl) -> (Tensor dresidual, Tensor dx, Tensor dparameters)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    residual, x, scale, weight, _bias, _eps, _dtype, ctx.impl = inputs
    residual_out, _y, mean, rstd = output
    ctx.x_dtype = None if x is None else x.dtype
    ctx.save_for_backward(residual if x is None else residual_out, mean, rstd, scale, weight)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dresidual_out, dy, _dmean, _drstd):
    residual_out, mean, rstd, scale, weight = ctx.saved_tensors
    has_x = ctx.x_dtype is not None
    dresidual = dresidual_out if has_x else None
    dx = dweight = dbias = None
    # Without scale dx equals dresidual: one tensor serves both.
    shared = has_x and scale is None and ctx.x_dtype == residual_out.dtype
    if dy is not None:
        x_dtype = None if shared else ctx.x_dtype
        dresidual, dx, dparameters = run_backward(
            dresidual, dy, residual_out, mean, rstd, scale, weight, x_dtype, ctx.impl
        )
        dbias, dweight = dparameters[0], dparameters[1]
    elif has_x and dresidual is not None and not shared:
        dx = (dresidual if scale is None else dresidual * scale.view(-1, 1, 1)).to(ctx.x_dtype)
    if shared:
        dx = dresidual
    return dresidual, dx if has_x else None, None, dweight, dbias, None, None, None


library.autograd(NAME, _differentiate, _setup_context, outputs=2)
