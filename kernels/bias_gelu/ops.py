"""``mimdet::bias_gelu``: bias and exact GELU as one operation, and its backward as another."""

from __future__ import annotations

import torch

from .. import dispatch, library

NAME = "bias_gelu"
# Rows per partial sum of the bias's gradient at least, and partial sums at most. Triton: 264 programs for each 1024
# channels fill an H100 or H200, of 132 multiprocessors, for 2048 and for 3072 channels.
_PARTIALS = {"triton": (8, 264), "cuda": (8, 1024), "cpp": (16, 64)}

dispatch.register(NAME, dispatch.standard())


def _forward(x, bias, impl):
    x, bias = library.dense(x, bias)
    y = torch.empty_like(x)
    if x.numel():
        library.launch(f"{NAME}_fwd", impl, x, bias, y, sizes=(x.shape[:-1].numel(), x.shape[-1]), typed=(x,))
    return y


def _fake_forward(x, bias, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(dy, x, bias, impl):
    dy, x, bias = library.dense(dy, x, bias)
    rows, channels = x.shape[:-1].numel(), x.shape[-1]
    dx = torch.empty_like(x)
    step = library.rows_per_partial(rows, *_PARTIALS[impl])
    db_partial = bias.new_empty((-(-rows // step), channels))
    if x.numel():
        library.launch(f"{NAME}_bwd", impl, dy, x, bias, step, dx, db_partial, sizes=(rows, channels), typed=(x,))
    return dx, db_partial.sum(0)


def _fake_backward(dy, x, bias, impl):
    return torch.empty_like(x, memory_format=torch.contiguous_format), bias.new_empty(bias.shape)


run = library.define(NAME, "(Tensor x, Tensor bias, str impl) -> Tensor", _forward, _fake_forward)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor dy, Tensor x, Tensor bias, str impl) -> (Tensor dx, Tensor dbias)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, bias, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx, dy):
    return *run_backward(dy, *ctx.saved_tensors, ctx.impl), None


library.autograd(NAME, _differentiate, _setup_context)
