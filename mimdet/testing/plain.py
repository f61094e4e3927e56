"""Every operation as PyTorch, torchvision and pycocotools compute it: a ruler that shares no code with the kernels.

Functions have the names and keyword arguments of ``mimdet.kernels``, and compute in the dtype of their inputs: float64
inputs give the exact result. What rounds once in every implementation is computed in float32 and rounded once here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, nms, roi_align


def add_layer_norm(
    residual: torch.Tensor,
    x: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, rounded to the residual's dtype, and ``F.layer_norm`` of it."""
    total = residual
    if x is not None:
        factor = 1 if scale is None else scale.view(-1, *[1] * (x.dim() - 1))
        total = (residual + x * factor).to(residual.dtype)
    y = F.layer_norm(_wide(total), weight.shape, _like(weight, total), _like(bias, total), eps)
    return total, y.to(total.dtype)


def attention_varlen(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float) -> torch.Tensor:
    """``F.scaled_dot_product_attention`` of each sequence alone."""
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        q, k, v = (t.transpose(0, 1)[None] for t in _wide(qkv[start:end]).unbind(1))
        part = F.scaled_dot_product_attention(q, k, v, scale=scale) if end > start else q
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts).to(qkv.dtype) if parts else qkv.sum(1)


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    training: bool,
    relu: bool,
    eps: float,
    sizes: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
) -> torch.Tensor:
    """``F.batch_norm``, then ReLU; of the images' areas alone, zero around them. Running statistics do not change."""
    if sizes is not None:
        inside = _area(x, sizes)
        cells = x.permute(0, 2, 3, 1)[inside].T[None, :, None]
        y = batch_norm(cells, weight, bias, training, relu, eps, None, running_mean, running_var)[0, :, 0].T
        return x.new_zeros(*inside.shape, x.shape[1]).index_put((inside,), y).permute(0, 3, 1, 2)
    if not x.numel():
        return x * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)
    # channels_last statistics are added up naively, which would double the budget.
    running = [_like(t, x) for t in (running_mean, running_var) if not training] or [None, None]
    y = F.batch_norm(_wide(x).contiguous(), *running, _like(weight, x), _like(bias, x), training, eps=eps)
    return (y.relu() if relu else y).to(x.dtype)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``F.gelu`` of the sum."""
    return F.gelu(x + bias).to(x.dtype)


def gather_add_pos(x: torch.Tensor, pos: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
    """``torch.gather`` of the tokens, plus the position embedding."""
    index = index.long()
    rows = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    return rows if pos is None else rows + pos[index]


def group_norm_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, sizes: torch.Tensor | None = None
) -> torch.Tensor:
    """``F.gelu`` of ``F.group_norm`` with one group; of each image's area alone, zero around it."""
    if sizes is not None:
        height, width = x.shape[2:]
        areas = []
        for image, (rows, columns) in zip(x, sizes.tolist(), strict=True):
            y = group_norm_gelu(image[None, :, :rows, :columns], weight, bias, eps)
            areas.append(F.pad(y, (0, width - columns, 0, height - rows)))
        return torch.cat(areas)
    return F.gelu(F.group_norm(x, 1, weight, bias, eps))


def layer_norm_gelu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, sizes: torch.Tensor | None = None
) -> torch.Tensor:
    """``F.gelu`` of ``F.layer_norm`` over the channels of each position; of each image's area alone, zero around it."""
    if sizes is not None:
        inside = _area(x, sizes)[:, None]
        return layer_norm_gelu(x.where(inside, 0), weight, bias, eps).where(inside, 0)
    return F.gelu(F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)).permute(0, 3, 1, 2)


def match_boxes(
    boxes: torch.Tensor,
    counts: torch.Tensor,
    candidates: torch.Tensor,
    outside: torch.Tensor | None,
    thresholds: Sequence[float],
    labels: Sequence[int],
    low_quality: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Detectron2's matcher on a matrix of torchvision's overlaps, image by image."""
    shape = len(boxes), candidates.shape[-2]
    outside = torch.zeros(shape, dtype=torch.bool) if outside is None else outside
    index = torch.zeros(shape, dtype=torch.int32)
    label = torch.full(shape, labels[0], dtype=torch.int8)
    for i, count in enumerate(counts.tolist()):
        if count and shape[1]:
            rows = candidates if candidates.dim() == 2 else candidates[i]
            overlap = box_iou(boxes[i, :count], rows).nan_to_num(0.0).masked_fill(outside[i], 0.0)
            best, slot = overlap.max(dim=0)
            index[i] = slot.int()
            band = sum((best >= threshold).long() for threshold in thresholds)
            label[i] = torch.tensor(labels, dtype=torch.int8)[band]
            if low_quality:
                label[i, (overlap == overlap.max(dim=1, keepdim=True).values).any(dim=0)] = 1
        label[i, outside[i]] = -1
    return index, label


def nms_slots(boxes: torch.Tensor, valid: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """``torchvision.ops.nms`` of each problem alone, with scores that descend."""
    keep = torch.zeros(valid.shape, dtype=torch.bool)
    for problem, rows, kept in zip(boxes, valid, keep, strict=True):
        place = rows.nonzero()[:, 0]
        scores = torch.arange(len(place), 0, -1, dtype=torch.float32)
        kept[place[nms(problem[place], scores, iou_threshold)]] = True
    return keep


def rasterize_polygons(
    points: torch.Tensor,
    polygon_starts: torch.Tensor,
    instance_starts: torch.Tensor,
    index: torch.Tensor,
    boxes: torch.Tensor,
    size: int,
) -> torch.Tensor:
    """pycocotools, box by box."""
    polygons = [points[slice(*ends)].numpy() for ends in pairwise(polygon_starts.tolist())]
    instances = [polygons[slice(*ends)] for ends in pairwise(instance_starts.tolist())]
    bitmaps = torch.zeros(len(boxes), size, size, dtype=torch.bool)
    for bitmap, instance, window in zip(bitmaps, index.tolist(), boxes.double().numpy(), strict=True):
        bitmap.copy_(torch.from_numpy(rasterize_by_pycocotools(instances[instance], window, size)))
    return bitmaps


def rasterize_by_pycocotools(polygons: Sequence[np.ndarray], window: np.ndarray, size: int) -> np.ndarray:
    """(size, size) bool of a list of (K, 2) float64 arrays inside a window x0, y0, x1, y1."""
    scale = size / np.maximum(window[2:] - window[:2], 0.1)
    moved = [((polygon - window[:2]) * scale).reshape(-1) for polygon in polygons]
    if not moved:
        return np.zeros((size, size), dtype=bool)
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(moved, size, size))).astype(bool)


def roi_align_levels(
    fine: torch.Tensor,
    coarse: torch.Tensor,
    boxes: torch.Tensor,
    valid: torch.Tensor,
    size: int,
    scales: Sequence[float],
    canonical_size: float,
    canonical_level: int,
    sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torchvision.ops.roi_align`` of every box on both maps, the one of its level taken; zeros for empty slots.

    With ``sizes`` (2, B, 2), on each image's area alone.
    """
    if sizes is not None:
        rest = {"size": size, "scales": scales, "canonical_size": canonical_size, "canonical_level": canonical_level}
        pooled = []
        for i, areas in enumerate(sizes.transpose(0, 1).tolist()):
            maps = [m[i : i + 1, :, :rows, :columns] for m, (rows, columns) in zip((fine, coarse), areas, strict=True)]
            pooled.append(roi_align_levels(*maps, boxes[i : i + 1], valid[i : i + 1], **rest))
        return torch.cat(pooled)
    sides = boxes[..., 2:] - boxes[..., :2]
    ideal = canonical_level + torch.log2(sides.prod(-1).sqrt() / canonical_size + 1e-8)
    first = round(-np.log2(scales[0]))
    level = (ideal.floor() - first).clamp(0, 1).flatten()
    wide = _wide(fine).dtype
    image = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    rois = torch.cat([image[:, None], boxes.flatten(0, 1)], dim=1).to(wide)
    pooled = [
        roi_align(feature.to(wide), rois, size, scale, sampling_ratio=0, aligned=True)
        for feature, scale in zip((fine, coarse), scales, strict=True)
    ]
    chosen = torch.where((level == 0).view(-1, 1, 1, 1), *pooled)
    return chosen.where(valid.flatten().view(-1, 1, 1, 1), 0).to(fine.dtype)


def sample_tokens(noise: torch.Tensor, valid_mask: torch.Tensor, ratio: float) -> tuple[torch.Tensor, ...]:
    """A stable ``argsort`` of the noise with padding last; both parts in raster order."""
    length = noise.shape[1]
    count = min(max(int(length * ratio), 1), length)
    order = noise.masked_fill(~valid_mask, torch.inf).argsort(dim=1, stable=True)
    kept, masked = order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values
    return kept, masked, torch.cat([kept, masked], dim=1).argsort(dim=1)


def scatter_fill(kept: torch.Tensor, fill: torch.Tensor, ids_restore: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """``torch.gather`` of the concatenated rows, plus the position embedding; zeros in padding."""
    rows = torch.cat([kept, fill], dim=1)
    index = ids_restore.long()[..., None]
    y = rows.gather(1, index.clamp(min=0).expand(-1, -1, rows.shape[2])) + pos
    return y.where(index >= 0, 0)


def _area(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(B, H, W) bool"""
    inside = torch.zeros(x[:, 0].shape, dtype=torch.bool)
    for image, (rows, columns) in zip(inside, sizes.tolist(), strict=True):
        image[:rows, :columns] = True
    return inside


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _like(parameter: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(torch.promote_types(x.dtype, torch.float32))
