"""``mimdet::rasterize_polygons``. Its results are bits: there is no gradient."""

from __future__ import annotations

import torch

from .. import dispatch, library

NAME = "rasterize_polygons"

# Points are float64 in all of them, and boxes become so.
dispatch.register(NAME, {name: impl._replace(dtypes=()) for name, impl in dispatch.standard("sizes up to 64").items()})


def _fake_forward(points, polygon_starts, instance_starts, index, boxes, size, impl):
    return points.new_empty((index.shape[0], size, size), dtype=torch.bool)


def _forward(points, polygon_starts, instance_starts, index, boxes, size, impl):
    masks = _fake_forward(points, polygon_starts, instance_starts, index, boxes, size, impl)
    if masks.numel():
        inputs = points, polygon_starts.int(), instance_starts.int(), index.long(), boxes.double()
        library.launch(f"{NAME}_fwd", impl, *library.dense(*inputs), masks, sizes=masks.shape[:2])
    return masks


run = library.define(
    NAME,
    "(Tensor points, Tensor polygon_starts, Tensor instance_starts, Tensor index, Tensor boxes, SymInt size, str impl)"
    " -> Tensor",
    _forward,
    _fake_forward,
)
