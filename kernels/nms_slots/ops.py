"""``mimdet::nms_slots``. Its results are bits: there is no gradient.

Plain PyTorch is inside of the operation too, for its loop depends on values, which a compiler does not have.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from .. import dispatch, library
from . import reference

NAME = "nms_slots"
# The GPU kernels hold a bit for every row of a problem.
LARGEST = 65536
WORD = 64  # rows of a problem whose bits are one word

# Boxes are float32 in all of them.
dispatch.register(
    NAME, {name: i._replace(dtypes=()) for name, i in dispatch.standard(f"at most {LARGEST} rows").items()}
)


def _fake_forward(boxes, valid, iou_threshold, stop_at, impl):
    return boxes.new_empty(boxes.shape[:2], dtype=torch.bool)


def _forward(boxes, valid, iou_threshold, stop_at, impl):
    iou_threshold = float_below(iou_threshold)
    if impl == "eager":
        return reference.nms_slots(boxes, valid, iou_threshold, stop_at)
    keep = _fake_forward(boxes, valid, iou_threshold, stop_at, impl)
    if keep.numel():
        boxes, valid = library.dense(boxes, valid)
        library.launch(f"{NAME}_fwd", impl, boxes, valid, iou_threshold, min(stop_at, keep.shape[1]), keep)
    return keep


@cache
def float_below(number: float) -> float:
    """The largest float32 that is not above a double: a float32 is greater than one exactly if than the other."""
    rounded = np.float32(number)
    if float(rounded) > number:
        rounded = np.nextafter(rounded, np.float32(0))
    return float(rounded)


def overlap_words(boxes: torch.Tensor) -> torch.Tensor:
    """Scratch of the GPU kernels: (Z, n, words) int64, bit j of word w says that the row suppresses row 64 w + j."""
    problems, rows, _ = boxes.shape
    return torch.empty((problems, rows, -(-rows // WORD)), dtype=torch.int64, device=boxes.device)


run = library.define(
    NAME,
    "(Tensor boxes, Tensor valid, float iou_threshold, SymInt stop_at, str impl) -> Tensor",
    _forward,
    _fake_forward,
)
