"""``mimdet::roi_align_levels`` and its backward; both make the same weights of rows and columns from the boxes."""

from __future__ import annotations

import torch

from .. import dispatch, library

NAME = "roi_align_levels"
# Of the GPU kernels: levels are arguments of one launch, a row of bins is one tile.
MOST_LEVELS, LARGEST_SIZE = 8, 64
LIMITS = f"at most {MOST_LEVELS} levels and {LARGEST_SIZE} cells a side"

dispatch.register(NAME, dispatch.standard(LIMITS))


def _fake_forward(features, boxes, levels, sizes, size, scales, sampling_ratio, impl):
    first, rows = features[0], boxes.shape[0] * boxes.shape[1]
    return _empty(rows, first.shape[1], size, size, first)


def _forward(features, boxes, levels, sizes, size, scales, sampling_ratio, impl):
    y = _fake_forward(features, boxes, levels, sizes, size, scales, sampling_ratio, impl)
    if y.numel():
        features = [f.contiguous(memory_format=torch.channels_last) for f in features]
        arguments = features, *_dense(boxes, levels, sizes), scales, sampling_ratio, y
        library.launch(f"{NAME}_fwd", impl, *arguments)
    return y


def _fake_backward(dy, boxes, levels, sizes, heights, widths, scales, sampling_ratio, impl):
    batch, channels = boxes.shape[0], dy.shape[1]
    return [_empty(batch, channels, h, w, dy) for h, w in zip(heights, widths, strict=True)]


def _backward(dy, boxes, levels, sizes, heights, widths, scales, sampling_ratio, impl):
    dfeatures = _fake_backward(dy, boxes, levels, sizes, heights, widths, scales, sampling_ratio, impl)
    if not dy.numel():
        return [d.zero_() for d in dfeatures]
    dy = dy.contiguous(memory_format=torch.channels_last)
    library.launch(f"{NAME}_bwd", impl, dy, *_dense(boxes, levels, sizes), scales, sampling_ratio, dfeatures)
    return dfeatures


def _empty(batch, channels, height, width, like):
    shape = batch, channels, height, width
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _dense(boxes, levels, sizes):
    return library.dense(boxes, levels, None if sizes is None else sizes.to(torch.int32))


run = library.define(
    NAME,
    "(Tensor[] features, Tensor boxes, Tensor levels, Tensor? sizes, SymInt size, float[] scales, int sampling_ratio,"
    " str impl) -> Tensor",
    _forward,
    _fake_forward,
)
run_backward = library.define(
    f"{NAME}_backward",
    "(Tensor dy, Tensor boxes, Tensor levels, Tensor? sizes, SymInt[] heights, SymInt[] widths, float[] scales,"
    " int sampling_ratio, str impl) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _setup_context(ctx, inputs, output):
    features, boxes, levels, sizes, _size, ctx.scales, ctx.sampling_ratio, ctx.impl = inputs
    ctx.heights, ctx.widths = ([f.shape[i] for f in features] for i in (2, 3))
    ctx.save_for_backward(boxes, levels, sizes)


def _differentiate(ctx, dy):
    boxes, levels, sizes = ctx.saved_tensors
    dfeatures = run_backward(
        dy, boxes, levels, sizes, ctx.heights, ctx.widths, ctx.scales, ctx.sampling_ratio, ctx.impl
    )
    return dfeatures, None, None, None, None, None, None, None


library.autograd(NAME, _differentiate, _setup_context)
