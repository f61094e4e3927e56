"""ROIAlign over all levels of a pyramid in one operation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch

from .. import checks, debug
from ..dispatch import resolve
from . import ops, reference

# Coordinates beyond are no boxes: float32 would miss their sample points by more than a cell.
LARGEST = 2.0**22


def roi_align_levels(
    features: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    valid: torch.Tensor,
    size: int,
    scales: Sequence[float],
    sampling_ratio: int = 0,
    *,
    canonical_size: float = 224,
    canonical_level: int = 4,
    sizes: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    """ROIAlign with half-pixel alignment, each box on the level that fits its size.

    Level ``floor(canonical_level + log2(sqrt(area) / canonical_size))`` has the stride 2**level; smaller and larger
    boxes go to the first and last one. The average of bilinear samples is a product of weights of rows and weights of
    columns, so every cell of a map is read once for each bin that it counts in. Backward gathers: each element of the
    gradient adds up the boxes over it in their order, without atomics, so it repeats bitwise. Sources: He et al.,
    "Mask R-CNN", 2017; Lin et al., "Feature Pyramid Networks for Object Detection", 2017, equation 1.

    Args:
        features: the levels, finest first, (B, C, H, W) each, of one float dtype. channels_last memory is read as it
            is, other strides are copied first.
        boxes: (B, S, 4) float, x1, y1, x2, y2 in pixels. They get no gradient.
        valid: (B, S) bool, which slots hold a box. The others give zeros and no gradient, whatever their box is. So
            does a box with a negative side, or a coordinate that is not finite or beyond 2**22.
        size: side of the pooled map, cells.
        scales: of each level, 1 / stride, each half of the one before.
        sampling_ratio: sample points along a side of a cell; 0 takes as many as the cell has rows (columns).
        canonical_size: boxes of this side, pixels, go to ``canonical_level``.
        canonical_level: log2 of that level's stride.
        sizes: (L, B, 2) int32 or int64, rows and columns of each image's valid area at each level, from its top left:
            1 .. H and 1 .. W (MIMDET_DEBUG_KERNELS=1 checks). ROIAlign ends there as it does at the end of a map.
            None: everything is valid.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (B * S, C, size, size) in the features' dtype and channels_last. Coordinates, weights and sums are float32.
        Gradients of first order, for the features.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: shapes, devices or numbers that do not fit together; while debugging, sizes outside of their range
            (RuntimeError from cpp, always).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    features = _checked(features, boxes, valid, size, scales, sampling_ratio, sizes)
    if sizes is not None and debug.enabled():
        for i, feature in enumerate(features):
            debug.check_sizes(sizes[i], tuple(feature.shape[2:]), f"{ops.NAME}: sizes[{i}]")
    levels = assign_levels(boxes, scales, canonical_size, canonical_level)
    levels = torch.where(valid, levels, -1).to(torch.int32)
    too_large = None
    if len(features) > ops.MOST_LEVELS or size > ops.LARGEST_SIZE:
        too_large = f"the GPU kernels take {ops.LIMITS}, got {len(features)} and {size} (use eager)"
    impl = resolve(ops.NAME, impl, features[0].device, (features[0].dtype,), too_large)
    if impl == "eager":
        return reference.roi_align_levels(features, boxes, levels, sizes, size, scales, sampling_ratio)
    return ops.run(features, boxes.float(), levels, sizes, size, [float(s) for s in scales], sampling_ratio, impl)


def assign_levels(
    boxes: torch.Tensor, scales: Sequence[float], canonical_size: float = 224, canonical_level: int = 4
) -> torch.Tensor:
    """(..., 4) boxes -> (...) int64 index into the levels; -1 for what ``roi_align_levels`` takes for no box."""
    first, last = pyramid(scales, ops.NAME)
    sides = boxes[..., 2:] - boxes[..., :2]
    side = (sides[..., 0] * sides[..., 1]).sqrt()
    level = torch.floor(canonical_level + torch.log2(side / canonical_size + 1e-8)).clamp(first, last)
    is_box = (boxes.abs() <= LARGEST).all(-1) & (sides >= 0).all(-1)
    return torch.where(is_box, level - first, -1).to(torch.int64)


def pyramid(scales: Sequence[float], name: str) -> tuple[int, int]:
    """log2 of the first and of the last stride.

    Raises:
        ValueError: scales that are not 1 / 2**n, each half of the one before; begins with ``name``.
    """
    strides = [-math.log2(scale) if scale > 0 else 0.5 for scale in scales]
    if not strides or any(b != a + 1 for a, b in pairwise(strides)) or strides[0] % 1 or strides[0] < 0:
        raise ValueError(f"{name}: scales must be 1/4, 1/8, ... each half of the one before, got {list(scales)}")
    return int(strides[0]), int(strides[-1])


def _checked(features, boxes, valid, size, scales, sampling_ratio, sizes) -> list[torch.Tensor]:
    """``features`` as a list."""
    if not isinstance(features, list | tuple) or not features:
        raise TypeError(f"{ops.NAME}: features must be a list of tensors, got {type(features).__name__}")
    checks.tensors(ops.NAME, **{f"features[{i}]": f for i, f in enumerate(features)}, boxes=boxes)
    first = features[0]
    for i, feature in enumerate(features):
        if feature.dtype != first.dtype:
            raise TypeError(f"{ops.NAME}: features[{i}] must be {first.dtype} like features[0], got {feature.dtype}")
        if feature.dim() != 4:
            raise ValueError(f"{ops.NAME}: features[{i}] must be (B, C, H, W), got {tuple(feature.shape)}")
        if feature.shape[:2] != first.shape[:2]:
            raise ValueError(f"{ops.NAME}: features[{i}] must be {(*first.shape[:2], 'H', 'W')} like features[0], "
                             f"got {tuple(feature.shape)}")  # fmt: skip
        if not (feature.shape[2] and feature.shape[3]):
            raise ValueError(f"{ops.NAME}: features[{i}] must have rows and columns, got {tuple(feature.shape)}")
    batch = first.shape[0]
    if boxes.dim() != 3 or boxes.shape[0] != batch or boxes.shape[2] != 4:
        raise ValueError(f"{ops.NAME}: boxes must be ({batch}, S, 4), got {tuple(boxes.shape)}")
    checks.booleans(ops.NAME, first, "features[0]", valid=valid)
    if valid.shape != boxes.shape[:2]:
        raise ValueError(f"{ops.NAME}: valid must be {tuple(boxes.shape[:2])}, got {tuple(valid.shape)}")
    if len(scales) != len(features):
        raise ValueError(f"{ops.NAME}: scales must have {len(features)} numbers like features, got {len(scales)}")
    if size < 1 or sampling_ratio < 0:
        raise ValueError(f"{ops.NAME}: size must be positive and sampling_ratio not negative, got {size} and "
                         f"{sampling_ratio}")  # fmt: skip
    if sizes is not None:
        checks.integers(ops.NAME, first, "features[0]", sizes=sizes)
        if sizes.shape != (len(features), batch, 2):
            raise ValueError(f"{ops.NAME}: sizes must be {(len(features), batch, 2)}, got {tuple(sizes.shape)}")
    return list(features)
