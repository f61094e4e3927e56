"""``mimdet::scatter_fill``, and the split that is its backward."""

from __future__ import annotations

from .. import dispatch, library

NAME = "scatter_fill"

dispatch.register(NAME, dispatch.standard())


def _fake_forward(kept, fill, ids_restore, pos, impl):
    return kept.new_empty((*ids_restore.shape, kept.shape[2]), dtype=pos.dtype)


def _forward(kept, fill, ids_restore, pos, impl):
    y = _fake_forward(kept, fill, ids_restore, pos, impl)
    if y.numel():
        kept, fill = library.rows(kept), library.rows(fill)
        ids_restore, pos = library.dense(library.index_for(impl, ids_restore), pos)
        batch, length, channels = y.shape
        sizes = *kept.stride()[:2], *fill.stride()[:2], batch * length, kept.shape[1], length, channels
        library.launch(f"{NAME}_fwd", impl, kept, fill, ids_restore, pos, y, sizes=sizes, typed=(kept, y))
    return y


def _fake_backward(dy, ids_restore, kept_rows, fill_rows, dtype, impl):
    return tuple(dy.new_empty((dy.shape[0], rows, dy.shape[2]), dtype=dtype) for rows in (kept_rows, fill_rows))


def _backward(dy, ids_restore, kept_rows, fill_rows, dtype, impl):
    dkept, dfill = _fake_backward(dy, ids_restore, kept_rows, fill_rows, dtype, impl)
    if dy.numel():
        dy, ids_restore = library.dense(dy, library.index_for(impl, ids_restore))
        batch, length, channels = dy.shape
        sizes = batch * length, kept_rows, fill_rows, length, channels
        library.launch(f"{NAME}_bwd", impl, dy, ids_restore, dkept, dfill, sizes=sizes, typed=(dy, dkept))
    return dkept, dfill


run = library.define(
    NAME, "(Tensor kept, Tensor fill, Tensor ids_restore, Tensor pos, str impl) -> Tensor", _forward, _fake_forward
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor dy, Tensor ids_restore, SymInt kept_rows, SymInt fill_rows, ScalarType dtype, str impl)"
    " -> (Tensor dkept, Tensor dfill)",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    kept, fill, ids_restore, _pos, ctx.impl = inputs
    ctx.rows, ctx.dtype = (kept.shape[1], fill.shape[1]), kept.dtype
    ctx.save_for_backward(ids_restore)


def _differentiate(ctx, dy):
    (ids_restore,) = ctx.saved_tensors
    dkept = dfill = dpos = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dkept, dfill = run_backward(dy, ids_restore, *ctx.rows, ctx.dtype, ctx.impl)
    if ctx.needs_input_grad[3]:
        if dy.shape[1] > sum(ctx.rows):  # there is padding
            dy = dy.masked_fill((ids_restore < 0)[..., None], 0)
        dpos = dy.sum(0)
    return dkept, dfill, None, dpos, None


library.autograd(NAME, _differentiate, _setup_context)
