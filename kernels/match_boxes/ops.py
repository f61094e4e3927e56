"""``mimdet::match_boxes``. Its results are integers: there is no gradient."""

from __future__ import annotations

import torch

from .. import dispatch, library

NAME = "match_boxes"
# Of the GPU kernels: thresholds are arguments of one launch.
MOST_THRESHOLDS = 8
LIMITS = f"at most {MOST_THRESHOLDS} thresholds"

# Boxes are float32 in all of them.
dispatch.register(NAME, {name: impl._replace(dtypes=()) for name, impl in dispatch.standard(LIMITS).items()})


def _fake_forward(boxes, counts, candidates, thresholds, labels, low_quality, outside, impl):
    shape = boxes.shape[0], candidates.shape[-2]
    return boxes.new_empty(shape, dtype=torch.int32), boxes.new_empty(shape, dtype=torch.int8)


def _forward(boxes, counts, candidates, thresholds, labels, low_quality, outside, impl):
    outputs = _fake_forward(boxes, counts, candidates, thresholds, labels, low_quality, outside, impl)
    batch, slots, count = *boxes.shape[:2], candidates.shape[-2]
    if batch and count:
        # Each box's best overlap, which candidates are compared with in a second pass.
        maxima = boxes.new_zeros((batch, slots)) if low_quality else None
        boxes, counts, candidates, outside = library.dense(boxes, counts.int(), candidates, outside)
        stride = 4 * count if candidates.dim() == 3 else 0
        library.launch(
            f"{NAME}_fwd", impl, boxes, counts, candidates, list(thresholds), list(labels), outside, maxima, *outputs,
            sizes=(len(thresholds), batch, slots, count, stride),
        )  # fmt: skip
    return outputs


run = library.define(
    NAME,
    "(Tensor boxes, Tensor counts, Tensor candidates, float[] thresholds, int[] labels, bool low_quality,"
    " Tensor? outside, str impl) -> (Tensor index, Tensor label)",
    _forward,
    _fake_forward,
)
