"""``mimdet::gather_add_pos``, and the scatter that is its backward."""

from __future__ import annotations

from .. import dispatch, library

NAME = "gather_add_pos"

dispatch.register(NAME, dispatch.standard())


def _fake_forward(x, pos, index, impl):
    return x.new_empty((*index.shape, x.shape[2]), dtype=x.dtype if pos is None else pos.dtype)


def _forward(x, pos, index, impl):
    y = _fake_forward(x, pos, index, impl)
    if y.numel():
        x, (pos, index) = library.rows(x), library.dense(pos, library.index_for(impl, index))
        batch, count, channels = y.shape
        sizes = *x.stride()[:2], batch * count, count, x.shape[1], channels
        library.launch(f"{NAME}_fwd", impl, x, pos, index, y, sizes=sizes, typed=(x, y))
    return y


def _fake_backward(dy, index, length, dtype, impl):
    return dy.new_empty((dy.shape[0], length, dy.shape[2]), dtype=dtype)


def _backward(dy, index, length, dtype, impl):
    dx = _fake_backward(dy, index, length, dtype, impl)
    if impl != "cpp" or dy.numel() == 0:  # C++ writes every row, the others only gathered rows
        dx.zero_()
    if dy.numel():
        dy, index = library.dense(dy, library.index_for(impl, index))
        batch, count, channels = dy.shape
        sizes = batch * count, count, length, channels
        library.launch(f"{NAME}_bwd", impl, dy, index, dx, sizes=sizes, typed=(dy, dx))
    return dx


run = library.define(NAME, "(Tensor x, Tensor? pos, Tensor index, str impl) -> Tensor", _forward, _fake_forward)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor dy, Tensor index, SymInt length, ScalarType dtype, str impl) -> Tensor",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    x, _pos, index, ctx.impl = inputs
    ctx.length, ctx.dtype = x.shape[1], x.dtype
    ctx.save_for_backward(index)


def _differentiate(ctx, dy):
    (index,) = ctx.saved_tensors
    dx = dpos = None
    if ctx.needs_input_grad[0]:
        dx = run_backward(dy, index, ctx.length, ctx.dtype, ctx.impl)
    if ctx.needs_input_grad[1]:
        rows = dx
        if rows is None or ctx.dtype != dy.dtype:
            rows = run_backward(dy, index, ctx.length, dy.dtype, ctx.impl)
        dpos = rows.sum(0)
    return dx, dpos, None, None


library.autograd(NAME, _differentiate, _setup_context)
