"""Bitmaps of the part of polygons that is inside boxes: the targets of a mask head."""

from __future__ import annotations

import torch

from .. import checks, debug
from ..dispatch import resolve
from . import ops, reference

# The GPU kernels hold a column of a bitmap in one word of 64 bits.
LARGEST = 64


def rasterize_polygons(
    points: torch.Tensor,
    polygon_starts: torch.Tensor,
    instance_starts: torch.Tensor,
    index: torch.Tensor,
    boxes: torch.Tensor,
    size: int,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """The polygons of an instance inside each box, scaled to size x size pixels; equal to pycocotools to the pixel.

    A polygon is filled by the even-odd rule, the polygons of an instance are joined. A pixel is set as ``rleFrPoly`` of
    pycocotools sets it: all is computed in double precision, without a walk along the outline, so that time depends
    on the number of points and not on the size of the box. A side of a box counts as a tenth of a pixel at least.
    Points further than 2**30 / 5 pixels of the bitmap from the box's corner, where pycocotools overflows, count as
    that far. There is no gradient.

    Args:
        points: (P, 2) float64, x and y in the pixels of the boxes; each polygon's in order, not closed. Any strides.
        polygon_starts: (Q + 1,) int32 or int64, where each polygon begins in ``points``, and the end of the last.
        instance_starts: (N + 1,) int32 or int64, where each instance begins among the polygons, and the end of the
            last. An instance without polygons is empty.
        index: (R,) int32 or int64, instance of each box. It and the starts must ascend and be within range:
            MIMDET_DEBUG_KERNELS=1 checks that, cpp always.
        boxes: (R, 4) x0, y0, x1, y1; any float dtype, taken as float64.
        size: side of the bitmaps; the GPU kernels take 64 at most.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (R, size, size) bool.

    Raises:
        TypeError: a dtype other than these.
        ValueError: shapes or devices that do not fit together, a size below 1; while debugging, starts that descend.
        IndexError: while debugging, a number out of range (from cpp always a RuntimeError).
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check(points, polygon_starts, instance_starts, index, boxes, size)
    if debug.enabled():
        debug.check_starts(polygon_starts, points.shape[0], "rasterize_polygons: polygon_starts")
        debug.check_starts(instance_starts, polygon_starts.shape[0] - 1, "rasterize_polygons: instance_starts")
        debug.check_index(index, instance_starts.shape[0] - 1, "rasterize_polygons: index")
    too_large = None if size <= LARGEST else f"bitmaps have at most {LARGEST} x {LARGEST} pixels (use eager)"
    impl = resolve(ops.NAME, impl, points.device, (points.dtype,), too_large)
    arguments = points.detach(), polygon_starts, instance_starts, index, boxes.detach()
    if impl == "eager":
        return reference.rasterize_polygons(*arguments, size)
    return ops.run(*arguments, size, impl)


def _check(points, polygon_starts, instance_starts, index, boxes, size):
    checks.tensors(ops.NAME, points=points, boxes=boxes)
    integers = {"polygon_starts": polygon_starts, "instance_starts": instance_starts, "index": index}
    checks.integers(ops.NAME, points, "points", **integers)
    if points.dtype != torch.float64:
        raise TypeError(f"rasterize_polygons: points must be float64, got {points.dtype}")
    if points.dim() != 2 or points.shape[1] != 2:
        raise ValueError(f"rasterize_polygons: points must be (P, 2), got {tuple(points.shape)}")
    for name, count in (("polygon_starts", "Q"), ("instance_starts", "N")):
        starts = integers[name]
        if starts.dim() != 1 or starts.shape[0] < 1:
            raise ValueError(f"rasterize_polygons: {name} must be ({count} + 1,), got {tuple(starts.shape)}")
    if index.dim() != 1:
        raise ValueError(f"rasterize_polygons: index must be (R,), got {tuple(index.shape)}")
    if boxes.dim() != 2 or boxes.shape[0] != index.shape[0] or boxes.shape[1] != 4:
        raise ValueError(f"rasterize_polygons: boxes must be ({index.shape[0]}, 4), got {tuple(boxes.shape)}")
    if size < 1:
        raise ValueError(f"rasterize_polygons: size must be 1 or more, got {size}")
