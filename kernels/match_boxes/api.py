"""The best ground-truth box of every candidate, and a label by their overlap."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from .. import checks, debug
from ..dispatch import resolve
from . import ops, reference


def match_boxes(
    boxes: torch.Tensor,
    counts: torch.Tensor,
    candidates: torch.Tensor,
    thresholds: Sequence[float],
    labels: Sequence[int],
    low_quality: bool = False,
    outside: torch.Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Assign candidates (anchors, proposals) to the ground-truth boxes of their image, all images at once.

    The overlap is intersection / (area + area - intersection) with every operation rounded once to float32, as
    ``torchvision.ops.box_iou`` computes it, and 0 where the boxes share no area or a number is NaN. The overlaps
    of all pairs are never in memory at once. Every implementation returns the same integers and waits for no GPU;
    time is proportional to the real boxes (in eager to the slots). There is no gradient. Source: Ren et al., "Faster
    R-CNN: Towards Real-Time Object Detection with Region Proposal Networks", 2015, section 3.1.2.

    Args:
        boxes: (B, G, 4) float32 x0, y0, x1, y1, G slots for the ground truth of each image. Any strides.
        counts: (B,) int32 or int64, how many slots of each image hold a box, the first ones; the others are not looked
            at. They must be within 0 .. G: MIMDET_DEBUG_KERNELS=1 checks that, cpp always.
        candidates: (N, 4) float32 for all images, or (B, N, 4).
        thresholds: ascending, above 0; they divide the overlaps into ``len(thresholds) + 1`` bands. An overlap equal
            to a threshold, rounded to float32, is in the upper band.
        labels: of each band, lowest first: 1 foreground, 0 background, -1 ignored.
        low_quality: also label 1 every candidate whose overlap with some box is the best that this box has, however
            low: of a box that no candidate overlaps, that is every candidate.
        outside: (B, N) bool, candidates that are no one's best: they get index 0 and label -1.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (B, N) int32 slot of the box with the best overlap, the first of equal ones, 0 if there is none;
        (B, N) int8 label, that of the lowest band in an image without boxes.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes, devices, thresholds or labels that do not fit together.
        IndexError: while debugging, a count out of range (from cpp always a RuntimeError).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check(boxes, counts, candidates, outside)
    thresholds, labels = _checked_bands(thresholds, labels)
    if debug.enabled():
        debug.check_index(counts, boxes.shape[1] + 1, f"{ops.NAME}: counts")
    too_large = None
    if len(thresholds) > ops.MOST_THRESHOLDS:
        too_large = f"the GPU kernels take {ops.LIMITS}, got {len(thresholds)} (use eager)"
    impl = resolve(ops.NAME, impl, boxes.device, (boxes.dtype,), too_large)
    arguments = boxes.detach(), counts, candidates.detach(), thresholds, labels, bool(low_quality), outside
    if impl == "eager":
        return reference.match_boxes(*arguments)
    return ops.run(*arguments, impl)


def _check(boxes, counts, candidates, outside):
    checks.tensors(ops.NAME, boxes=boxes, candidates=candidates)
    checks.integers(ops.NAME, boxes, "boxes", counts=counts)
    for name, tensor in (("boxes", boxes), ("candidates", candidates)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{ops.NAME}: {name} must be float32, got {tensor.dtype}")
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"{ops.NAME}: boxes must be (B, G, 4), got {tuple(boxes.shape)}")
    batch = boxes.shape[0]
    if counts.shape != (batch,):
        raise ValueError(f"{ops.NAME}: counts must be ({batch},), got {tuple(counts.shape)}")
    of_images = candidates.dim() == 3 and candidates.shape[0] == batch
    if not (candidates.dim() == 2 or of_images) or candidates.shape[-1] != 4:
        raise ValueError(f"{ops.NAME}: candidates must be (N, 4) or ({batch}, N, 4), got {tuple(candidates.shape)}")
    if outside is not None:
        checks.booleans(ops.NAME, boxes, "boxes", outside=outside)
        if outside.shape != (batch, candidates.shape[-2]):
            shape = batch, candidates.shape[-2]
            raise ValueError(f"{ops.NAME}: outside must be {shape}, got {tuple(outside.shape)}")


def _checked_bands(thresholds, labels) -> tuple[list[float], list[int]]:
    thresholds, labels = [float(t) for t in thresholds], list(labels)
    if not thresholds or not thresholds[0] > 0 or any(not a <= b for a, b in pairwise(thresholds)):
        raise ValueError(f"{ops.NAME}: thresholds must be one or more ascending numbers above 0, got {thresholds}")
    if len(labels) != len(thresholds) + 1:
        raise ValueError(f"{ops.NAME}: labels must be {len(thresholds) + 1}, one more than thresholds, got {labels}")
    if any(label not in (-1, 0, 1) for label in labels):
        raise ValueError(f"{ops.NAME}: labels must be -1, 0 or 1, got {labels}")
    return thresholds, [int(label) for label in labels]
