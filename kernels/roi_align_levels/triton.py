"""ROIAlign over all levels of a pyramid on a GPU through Triton.

The average of a bin's bilinear samples is separable: a first kernel writes, for each axis of each ROI, the positions of
the map that each bin reads (``ranges``) and their weights. Position p of bin b is at ``p + GAP * b`` of the axis'
weights: the next bin begins at most one position before the last one's end, and rounding may add one.

Levels come as tuples, so that one launch has them all; their numbers are floats, because Triton compiles anew for
integers that 16 divides, or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

GAP = tl.constexpr(3)
# Side of the tiles of a map that a program of backward has.
SIDE = tl.constexpr(8)
# Bins that a program has: less than a row of them, so that rows of any length are read by one kernel.
_BINS = 8
# The fewest and most channels that a program has, and the sums that a warp may hold.
_CHANNELS = 16, 256
_SUMS = 512


@triton.jit(do_not_specialize=["rois", "slots", "batch", "length"])
def _roi_align_levels_axes_kernel(
    boxes, levels, sizes, ranges, weights, heights, widths, scales, rois, slots, batch, length, P, sampling_ratio,
    HAS_SIZES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """boxes: (N, 4); levels: (N,); sizes: (L, B, 2); ranges: (N, 2, P, 2), first and last position of each bin;
    weights: (N, 2, length). A lane has a bin of one axis of one of the N = B * slots ROIs."""
    bins = tl.cast(P, tl.int64)
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    roi, axis, b = lane // (2 * bins), lane // bins % 2, lane % bins
    inside = roi < rois
    level = tl.load(levels + roi, mask=inside, other=-1)
    most, scale = tl.full((BLOCK,), 1.0, tl.float32), tl.full((BLOCK,), 0.0, tl.float32)
    for i in tl.static_range(len(scales)):
        here = level == i
        scale = tl.where(here, scales[i], scale)
        most = tl.where(here, tl.where(axis == 0, heights[i], widths[i]), most)
    # Without a level there is no box: whatever its numbers are, it has no samples.
    exists = scale > 0.0
    if HAS_SIZES:
        at = sizes + 2 * (level * tl.cast(batch, tl.int64) + roi // slots) + axis
        most = tl.load(at, mask=exists, other=1).to(tl.float32)
    start = tl.load(boxes + 4 * roi + 1 - axis, mask=exists, other=0.0) * scale - 0.5
    stop = tl.load(boxes + 4 * roi + 3 - axis, mask=exists, other=0.0) * scale - 0.5
    size = tl.div_rn(stop - start, tl.cast(P, tl.float32))
    grid = tl.where(exists, tl.where(sampling_ratio > 0.0, sampling_ratio, tl.ceil(size)), 0.0)
    base = start + b.to(tl.float32) * size
    # The samples on the map: an estimate, and steps to where it ends exactly.
    step = tl.maximum(tl.div_rn(size, tl.maximum(grid, 1.0)), 1e-20)
    count = grid.to(tl.int32)
    first = tl.minimum(tl.maximum(_nearest(-1.0, base, step, grid) - 2, 0), count)
    last = tl.minimum(_nearest(most, base, step, grid) + 2, count - 1)
    for _i in tl.static_range(5):
        first += ((first <= last) & (_sample(first, base, size, grid) < -1.0)).to(tl.int32)
        last -= ((first <= last) & (_sample(last, base, size, grid) > most)).to(tl.int32)
    end = most.to(tl.int32) - 1
    low = tl.minimum(tl.maximum(_sample(first, base, size, grid), 0.0).to(tl.int32), end)
    high = tl.minimum(tl.maximum(_sample(last, base, size, grid), 0.0).to(tl.int32) + 1, end)
    # A bin without samples on the map has its range on the side where they are.
    after = (count > 0) & (_sample(count - 1, base, size, grid) >= -1.0)
    low = tl.where(first <= last, low, tl.where(after, end + 1, 0))
    high = tl.where(first <= last, high, low - 1)
    tl.store(ranges + 2 * lane, low, mask=inside)
    tl.store(ranges + 2 * lane + 1, high, mask=inside)
    # Of a bin's samples, those next to a position: within one of it, at the map's ends two.
    near = tl.max(tl.minimum(tl.ceil(tl.minimum(3.0 / step, 1e6)) + 4.0, grid).to(tl.int32))
    weights += (2 * roi + axis) * length + GAP * b
    for k in range(tl.max(high - low) + 1):
        p = low + k
        j = tl.maximum(_nearest(p.to(tl.float32) - 1.0, base, step, grid) - 2, first)
        weight = tl.zeros((BLOCK,), tl.float32)
        for _n in range(near):
            sample = tl.maximum(_sample(j, base, size, grid), 0.0)
            below = tl.minimum(sample.to(tl.int32), end)
            fraction = tl.where(below == end, 0.0, sample - below.to(tl.float32))
            share = tl.where(p == below, 1.0 - fraction, tl.where(p == below + 1, fraction, 0.0))
            weight += tl.where(j <= last, share, 0.0)
            j += 1
        tl.store(weights + p, tl.div_rn(weight, tl.maximum(grid, 1.0)), mask=inside & (p <= high))


@triton.jit
def _nearest(position, base, step, grid):
    """Number of the sample at a position, within two; just outside of the samples where it is beyond them."""
    i = (position - base) / step - 0.5
    return tl.minimum(tl.maximum(i, -4.0), grid + 4.0).to(tl.int32)


@triton.jit
def _sample(i, base, size, grid):
    """Position of sample i of a bin."""
    return base + tl.div_rn((i.to(tl.float32) + 0.5) * size, tl.maximum(grid, 1.0))


@triton.jit(do_not_specialize=["slots", "length"])
def _roi_align_levels_fwd_kernel(
    features, levels, ranges, weights, y, heights, widths, slots, length, C, P, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """features: (B, H, W, C) each; y: (N, P, P, C). A program has BLOCK_P bins of a row of one ROI."""
    program = tl.program_id(0)
    roi = (program // P).to(tl.int64)
    row = (program % P).to(tl.int64)
    level = tl.load(levels + roi)
    feature = features[0]
    height, width = heights[0], widths[0]
    for i in tl.static_range(1, len(features)):
        if level == i:
            feature = features[i]
            height, width = heights[i], widths[i]
    width = tl.cast(width, tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    feature += roi // slots * tl.cast(height, tl.int64) * width * C
    begin = tl.program_id(2) * BLOCK_P
    b, bins = tl.arange(0, BLOCK_P), P - begin
    of_rows = ranges + 4 * roi * P + 2 * row
    of_columns = ranges + (4 * roi + 2) * P + 2 * begin + 2 * b
    weights += 2 * roi * length
    of_bins = weights + length + GAP * begin
    first = tl.load(of_columns, mask=b < bins, other=0)
    last = tl.load(of_columns + 1, mask=b < bins, other=-1)
    longest = tl.max(last - first) + 1
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for p in range(tl.load(of_rows), tl.load(of_rows + 1) + 1):
        row_weight = tl.load(weights + p + GAP * row)
        for k in range(longest):
            x = first + k
            w = tl.load(of_bins + x + GAP * b, mask=x <= last, other=0.0) * row_weight
            at = feature + (p * width + x)[:, None] * C + c[None, :]
            # No weight between the points of a sparse grid.
            value = tl.load(at, mask=(w != 0.0)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
            total += w[:, None] * value
    to = y + ((roi * P + row) * P + begin) * C + b[:, None].to(tl.int64) * C + c[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=(b < bins)[:, None] & (c < C)[None, :])


@triton.jit
def _tiles(height, width):
    """Tiles of a map."""
    return tl.cdiv(tl.cast(height, tl.int64), SIDE) * tl.cdiv(tl.cast(width, tl.int64), SIDE)


@triton.jit(do_not_specialize=["slots", "length"])
def _roi_align_levels_bwd_kernel(
    dy, levels, ranges, weights, dfeatures, heights, widths, slots, length, C, P, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dy: (N, P, P, C); dfeatures: (B, H, W, C) each. A program has a tile of one image's map of one level, and adds up
    the ROIs over it in their order."""
    bins = tl.cast(P, tl.int64)
    tiles = tl.full((), 0, tl.int64)
    for i in tl.static_range(len(heights)):
        tiles += _tiles(heights[i], widths[i])
    image = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    out = dfeatures[0]
    height, width = tl.cast(heights[0], tl.int64), tl.cast(widths[0], tl.int64)
    level = 0
    begin = tl.full((), 0, tl.int64)
    before = begin
    for i in tl.static_range(len(heights)):
        if tile >= begin:
            level, before = i, begin
            out = dfeatures[i]
            height, width = tl.cast(heights[i], tl.int64), tl.cast(widths[i], tl.int64)
        begin += _tiles(heights[i], widths[i])
    across = tl.cdiv(width, SIDE)
    top = (tile - before) // across * SIDE
    left = (tile - before) % across * SIDE
    cell = tl.arange(0, SIDE * SIDE)
    row, column = top + cell // SIDE, left + cell % SIDE
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((SIDE * SIDE, BLOCK_C), tl.float32)
    for start in range(0, slots, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        inside = slot < slots
        roi = image * slots + slot
        inside &= tl.load(levels + roi, mask=inside, other=-1) == level
        of_rows = ranges + 4 * roi * bins
        of_columns = of_rows + 2 * bins
        inside &= tl.load(of_rows, mask=inside, other=0) < top + SIDE
        inside &= tl.load(of_rows + 2 * bins - 1, mask=inside, other=-1) >= top
        inside &= tl.load(of_columns, mask=inside, other=0) < left + SIDE
        inside &= tl.load(of_columns + 2 * bins - 1, mask=inside, other=-1) >= left
        waiting = tl.where(inside, slot, slots)
        chosen = tl.min(waiting)
        while chosen < slots:
            n = image * slots + chosen
            row_ranges = ranges + 4 * n * bins
            row_weights = weights + 2 * n * length
            column_weights = row_weights + length
            for ph in range(bins):
                low, high = tl.load(row_ranges + 2 * ph), tl.load(row_ranges + 2 * ph + 1)
                if (low < top + SIDE) & (high >= top):
                    of_row = (row >= low) & (row <= high)
                    row_weight = tl.load(row_weights + row + GAP * ph, mask=of_row, other=0.0)
                    for pw in range(bins):
                        at = row_ranges + 2 * bins + 2 * pw
                        low_x, high_x = tl.load(at), tl.load(at + 1)
                        if (low_x < left + SIDE) & (high_x >= left):
                            of_column = (column >= low_x) & (column <= high_x)
                            w = tl.load(column_weights + column + GAP * pw, mask=of_column, other=0.0) * row_weight
                            grad = tl.load(dy + ((n * bins + ph) * bins + pw) * C + c, mask=c < C, other=0.0).to(
                                tl.float32
                            )
                            total += w[:, None] * grad[None, :]
            chosen = tl.min(tl.where(waiting > chosen, waiting, slots))
    position = (image * height + row) * width + column
    mask = ((row < height) & (column < width))[:, None] & (c < C)[None, :]
    tl.store(out + position[:, None] * C + c[None, :], total.to(out.dtype.element_ty), mask=mask)


def launch_roi_align_levels_fwd(features, boxes, levels, sizes, scales, sampling_ratio, y):
    """features (B, C, H, W) and y (B * S, C, P, P) channels_last, boxes (B, S, 4), levels (B, S), sizes (L, B, 2)."""
    rows, channels, side, _ = y.shape
    tables = _axes(boxes, levels, sizes, scales, sampling_ratio, features, side)
    block_c = _block_c(channels, _BINS, warps=4)
    grid = rows * side, triton.cdiv(channels, block_c), triton.cdiv(side, _BINS)
    _roi_align_levels_fwd_kernel[grid](
        tuple(features), levels, *tables, y, *_shapes(features), boxes.shape[1], tables[1].shape[2], channels, side,
        BLOCK_P=_BINS, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


def launch_roi_align_levels_bwd(dy, boxes, levels, sizes, scales, sampling_ratio, dfeatures):
    """dy (B * S, C, P, P) channels_last, and what forward took -> dfeatures (B, C, H, W) channels_last."""
    channels, side = dy.shape[1:3]
    tables = _axes(boxes, levels, sizes, scales, sampling_ratio, dfeatures, side)
    block_c = _block_c(channels, SIDE.value**2, warps=8)
    tiles = sum(triton.cdiv(d.shape[2], SIDE.value) * triton.cdiv(d.shape[3], SIDE.value) for d in dfeatures)
    slots = boxes.shape[1]
    _roi_align_levels_bwd_kernel[(len(boxes) * tiles, triton.cdiv(channels, block_c))](
        dy, levels, *tables, tuple(dfeatures), *_shapes(dfeatures), slots, tables[1].shape[2], channels, side,
        BLOCK_N=128, BLOCK_C=block_c, num_warps=8,
    )  # fmt: skip


def _axes(boxes, levels, sizes, scales, sampling_ratio, maps, side):
    """ranges (N, 2, P, 2) int32 and weights (N, 2, length) of rows and columns of every ROI."""
    rois = levels.numel()
    length = max(max(m.shape[2:]) for m in maps) + GAP.value * side
    ranges = torch.empty((rois, 2, side, 2), dtype=torch.int32, device=boxes.device)
    weights = torch.empty((rois, 2, length), dtype=torch.float32, device=boxes.device)
    _roi_align_levels_axes_kernel[(triton.cdiv(2 * rois * side, 128),)](
        boxes, levels, sizes, ranges, weights, *_shapes(maps), tuple(map(float, scales)), rois, boxes.shape[1],
        len(boxes), length, side, float(sampling_ratio), HAS_SIZES=sizes is not None, BLOCK=128,
    )  # fmt: skip
    return ranges, weights


def _shapes(maps):
    return tuple(float(m.shape[2]) for m in maps), tuple(float(m.shape[3]) for m in maps)


def _block_c(channels, rows, warps):
    least, most = _CHANNELS
    return max(least, min(most, triton.next_power_of_2(channels), warps * _SUMS // rows))
