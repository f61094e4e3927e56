"""Rasterization of polygons on a GPU through Triton, one program a box."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Pairs of an edge and a column that a program looks at together: more of them spill registers.
_PAIRS = 512
_FAR = tl.constexpr(2.0**30 - 1)


@triton.jit
def _position(p, corner, scale):
    """int32 on the grid of fifths of a pixel; what is further than int32 differences allow, or NaN, is moved there."""
    p = 5.0 * ((p - corner) * scale) + 0.5
    p = tl.where(p > -_FAR, p, -_FAR)
    return tl.where(p < _FAR, p, _FAR).to(tl.int32)


@triton.jit
def _rasterize_polygons_fwd_kernel(
    points, polygon_starts, instance_starts, index, boxes, masks, size,
    EDGES: tl.constexpr, COLUMNS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """points: (P, 2) float64; starts: int32; index: (R,) int64; boxes: (R, 4) float64; masks: (R, size, size) uint8.
    A column is a word of bits, its top row the lowest; see ``reference`` for the mathematics."""
    r = tl.program_id(0).to(tl.int64)
    instance = tl.load(index + r)
    left, top = tl.load(boxes + r * 4), tl.load(boxes + r * 4 + 1)
    width, height = tl.load(boxes + r * 4 + 2) - left, tl.load(boxes + r * 4 + 3) - top
    side = tl.full((), size, tl.float64)
    scale_x = side / tl.where(width > 0.1, width, 0.1)
    scale_y = side / tl.where(height > 0.1, height, 0.1)
    column = tl.arange(0, COLUMNS)
    at = 5 * column[None, :] + 2
    union = tl.zeros((COLUMNS,), WORD)
    for polygon in range(tl.load(instance_starts + instance), tl.load(instance_starts + instance + 1)):
        first, end = tl.load(polygon_starts + polygon), tl.load(polygon_starts + polygon + 1)
        inside = tl.zeros((COLUMNS,), WORD)
        for start in range(first, end, EDGES):
            i = start + tl.arange(0, EDGES)
            here = i < end
            j = tl.where(i + 1 < end, i + 1, first)
            one, other = points + i.to(tl.int64) * 2, points + j.to(tl.int64) * 2
            xa = _position(tl.load(one, mask=here, other=0.0), left, scale_x)
            ya = _position(tl.load(one + 1, mask=here, other=0.0), top, scale_y)
            xb = _position(tl.load(other, mask=here, other=0.0), left, scale_x)
            yb = _position(tl.load(other + 1, mask=here, other=0.0), top, scale_y)
            # The axis on which the edge is longer is walked upwards.
            flat = tl.abs(xb - xa) >= tl.abs(yb - ya)
            back = tl.where(flat, xa > xb, ya > yb)
            x0, y0 = tl.where(back, xb, xa), tl.where(back, yb, ya)
            x1, y1 = tl.where(back, xa, xb), tl.where(back, ya, yb)
            run, rise = tl.where(flat, x1 - x0, y1 - y0), tl.where(flat, y1 - y0, x1 - x0)
            slope = (rise.to(tl.float64) / tl.maximum(run, 1).to(tl.float64))[:, None]
            begin = tl.where(flat, y0, x0)[:, None].to(tl.float64)
            crosses = here[:, None] & (tl.minimum(x0, x1)[:, None] <= at) & (at < tl.maximum(x0, x1)[:, None])
            # Of a steep edge the first step across the column, from its real number, a step from the exact one.
            guess = (at.to(tl.float64) + 0.5 - begin) / tl.where(slope == 0.0, 1.0, slope)
            guess = tl.where(crosses, guess, 0.0)
            step = tl.ceil(guess).to(tl.int32) - 1
            step = tl.minimum(tl.maximum(step, 1), run[:, None])
            t = tl.where(flat[:, None], at - x0[:, None], step)
            # At t, and one step later: heights of a flat edge, columns of a steep one.
            a = (begin + slope * t.to(tl.float64) + 0.5).to(tl.int32)
            b = (begin + slope * (t + 1).to(tl.float64) + 0.5).to(tl.int32)
            beyond_a = tl.where(slope > 0.0, a > at, a <= at)
            beyond_b = tl.where(slope > 0.0, b > at, b <= at)
            later = tl.where(beyond_a, 0, tl.where(beyond_b, 1, 2))
            v = tl.where(flat[:, None], tl.minimum(a, b), y0[:, None] + t + later - 1)
            row = tl.where(v <= 2, 0, tl.minimum((v + 2) // 5, size)).to(WORD)
            ones = tl.full((EDGES, COLUMNS), -1, WORD)
            flip = tl.where(crosses & (row < size), ones << tl.minimum(row, size - 1), 0)
            inside ^= tl.xor_sum(flip, axis=0)
        union |= inside
    rows = tl.arange(0, COLUMNS)[:, None]
    pixel = ((union[None, :] >> rows.to(WORD)) & 1).to(tl.uint8)
    place = masks + (r * size + rows) * size + column[None, :]
    tl.store(place, pixel, mask=(rows < size) & (column[None, :] < size))


def launch_rasterize_polygons_fwd(
    points: torch.Tensor, polygon_starts: torch.Tensor, instance_starts: torch.Tensor, index: torch.Tensor,
    boxes: torch.Tensor, masks: torch.Tensor,
) -> None:  # fmt: skip
    """Contiguous points, starts, index and float64 boxes -> masks (R, size, size) bool."""
    count, size, _ = masks.shape
    columns = max(16, triton.next_power_of_2(size))
    # Sums of products are rounded twice, as in C: fused they would differ in the last bit, and so in pixels.
    _rasterize_polygons_fwd_kernel[(count,)](
        points, polygon_starts, instance_starts, index, boxes, masks.view(torch.uint8), size,
        EDGES=_PAIRS // columns, COLUMNS=columns, WORD=tl.int32 if columns <= 32 else tl.int64,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
