"""Non-maximum suppression whose result has the shape of its input."""

from __future__ import annotations

import torch

from .. import checks
from ..dispatch import resolve
from . import ops


def nms_slots(
    boxes: torch.Tensor,
    valid: torch.Tensor,
    iou_threshold: float,
    stop_at: int | None = None,
    *,
    impl: str | None = None,
) -> torch.Tensor:
    """Greedy non-maximum suppression of Z independent problems, by position: the first row of a problem is its best.

    A row is kept if it is valid and no kept row before it overlaps it by an IoU above the threshold. That is the result
    of ``torchvision.ops.nms`` on a CPU for scores that descend, of each problem alone: areas, intersection and IoU are
    rounded to float32 at every step. A box with a NaN is kept and suppresses nothing. Values of rows that are not valid
    change nothing. Triton and CUDA never wait for the GPU, eager does. No shape depends on values.
    There is no gradient.

    Args:
        boxes: (Z, n, 4) float32 x0, y0, x1, y1, best first; any strides. The GPU kernels take 65536 rows at most.
        valid: (Z, n) bool, the rows that take part, anywhere; any strides.
        iou_threshold: in [0, 1], compared as the double that it is.
        stop_at: rows of a problem to keep at most; the first ones are those of the complete result. None keeps all.
        impl: see ``mimdet.kernels.dispatch``.

    Returns:
        (Z, n) bool.

    Raises:
        TypeError: boxes are not float32, valid is not bool, iou_threshold is not a number, stop_at not an integer.
        ValueError: shapes or devices that do not fit together, a threshold outside [0, 1], a negative stop_at.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    _check(boxes, valid, iou_threshold, stop_at)
    rows = boxes.shape[1]
    too_large = None if rows <= ops.LARGEST else f"a problem has at most {ops.LARGEST} rows (use eager)"
    impl = resolve(ops.NAME, impl, boxes.device, (boxes.dtype,), too_large)
    return ops.run(boxes.detach(), valid, float(iou_threshold), rows if stop_at is None else stop_at, impl)


def _check(boxes, valid, iou_threshold, stop_at):
    checks.tensors(ops.NAME, boxes=boxes)
    checks.booleans(ops.NAME, boxes, "boxes", valid=valid)
    if boxes.dtype != torch.float32:
        raise TypeError(f"nms_slots: boxes must be float32, got {boxes.dtype}")
    if boxes.dim() != 3 or boxes.shape[2] != 4:
        raise ValueError(f"nms_slots: boxes must be (Z, n, 4), got {tuple(boxes.shape)}")
    if valid.shape != boxes.shape[:2]:
        raise ValueError(f"nms_slots: valid must be {tuple(boxes.shape[:2])}, got {tuple(valid.shape)}")
    if not isinstance(iou_threshold, (int, float)):
        raise TypeError(f"nms_slots: iou_threshold must be a number, got {type(iou_threshold).__name__}")
    if not 0.0 <= iou_threshold <= 1.0:  # NaN too
        raise ValueError(f"nms_slots: iou_threshold must be in [0, 1], got {iou_threshold}")
    if stop_at is None:
        return
    if not isinstance(stop_at, int) or isinstance(stop_at, bool):
        raise TypeError(f"nms_slots: stop_at must be an integer or None, got {type(stop_at).__name__}")
    if stop_at < 0:
        raise ValueError(f"nms_slots: stop_at must be 0 or more, got {stop_at}")
