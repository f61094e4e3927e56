"""Rasterization of polygons in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

# Points beyond are moved here: differences of two fit int32, in which the kernels compute.
_FAR = 2.0**30 - 1


def rasterize_polygons(
    points: Tensor, polygon_starts: Tensor, instance_starts: Tensor, index: Tensor, boxes: Tensor, size: int
) -> Tensor:
    """The polygons of instance ``index[r]`` within ``boxes[r]``, as pycocotools' ``rleFrPoly`` and ``merge`` fill them.

    Points lie on a grid of fifths of a pixel. The outline crosses column c between 5c + 2 and 5c + 3; the crossing at
    height v flips all pixels of the column from row ceil((v - 2) / 5) on.

    Args:
        points: (P, 2) float64; polygon_starts: (Q + 1,); instance_starts: (N + 1,); index: (R,); boxes: (R, 4).
        size: M, side of the bitmaps.

    Returns:
        (R, M, M) bool.
    """
    # One row for every polygon of every box, then one for every edge of those.
    box, polygon = _expand(instance_starts.long(), index.long())
    row, start = _expand(polygon_starts.long(), polygon)
    last = start + 1 == polygon_starts.long()[polygon + 1][row]
    end = torch.where(last, polygon_starts.long()[polygon][row], start + 1)
    corner, opposite = boxes.double().unflatten(1, (2, 2)).unbind(1)
    sides = (opposite - corner).clamp(min=0.1)
    scale = torch.full_like(sides, size) / sides  # PyTorch's size / sides multiplies by the reciprocal
    corner, scale = corner[box][row], scale[box][row]
    ends = torch.stack([((points[i] - corner) * scale * 5 + 0.5) for i in (start, end)])
    x, y = ends.nan_to_num(-_FAR).clamp(-_FAR, _FAR).trunc().unbind(-1)

    # Along an edge the axis on which it is longer is walked upwards, the other one is rounded.
    flat = (x[1] - x[0]).abs() >= (y[1] - y[0]).abs()
    walked = torch.where(flat, x, y)
    back = walked[0] > walked[1]
    x, y = torch.where(back, x.flip(0), x), torch.where(back, y.flip(0), y)
    run, rise = torch.where(flat, x, y).diff(dim=0)[0], torch.where(flat, y, x).diff(dim=0)[0]
    slope = rise / run
    edge, column = ((x.amin(0)[:, None] <= _grid(x, size)) & (_grid(x, size) < x.amax(0)[:, None])).nonzero().unbind(1)
    at = 5.0 * column + 2
    flat, slope, run, x0, y0 = flat[edge], slope[edge], run[edge], x[0, edge], y[0, edge]

    def lower(t):  # of a flat edge
        return (y0 + slope * t + 0.5).trunc()

    def beyond(t):  # of a steep edge, whether it has crossed
        u = (x0 + slope * t + 0.5).trunc()
        return torch.where(slope > 0, u > at, u <= at)

    # The step that crosses, from its real number, which is not a step from the exact one.
    step = (((at + 0.5 - x0) / slope).ceil() - 1).maximum(torch.ones_like(run)).minimum(run)
    step = torch.where(beyond(step), step, torch.where(beyond(step + 1), step + 1, step + 2))
    v = torch.where(flat, torch.minimum(lower(at - x0), lower(at - x0 + 1)), y0 + step - 1)
    cell = row[edge], ((v - 2) / 5).ceil().clamp(0, size).long(), column
    crossings = torch.zeros(len(box), size + 1, size, dtype=torch.int32, device=points.device)
    crossings.index_put_(cell, crossings.new_ones(()), accumulate=True)
    inside = crossings[:, :size].cumsum(1) % 2
    return inside.new_zeros(len(index), size, size).index_add_(0, box, inside) > 0


def _expand(starts: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """For every member of the groups ``which``: the place of its group in ``which``, and its number."""
    counts = starts.diff()[which]
    place = torch.arange(len(which), device=which.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    number = torch.arange(len(place), device=which.device) - before[place] + starts[which][place]
    return place, number


def _grid(x: Tensor, size: int) -> Tensor:
    return 5.0 * torch.arange(size, device=x.device, dtype=x.dtype) + 2
