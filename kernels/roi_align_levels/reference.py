"""ROIAlign over all levels of a pyramid, in plain PyTorch: what every implementation is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torchvision.ops import roi_align


def roi_align_levels(
    features: Sequence[torch.Tensor],
    boxes: torch.Tensor,
    levels: torch.Tensor,
    sizes: torch.Tensor | None,
    size: int,
    scales: Sequence[float],
    sampling_ratio: int,
) -> torch.Tensor:
    """torchvision's ROIAlign, aligned, level by level in float32.

    Args:
        features: the levels, (B, C, H, W) each.
        boxes: (B, S, 4), pixels.
        levels: (B, S) integers, of each box; another number than 0 .. L - 1 gives zeros.
        sizes: (L, B, 2), rows and columns of each image's valid area at each level; None: everything is valid.
        size, scales, sampling_ratio: as ``api`` has them.

    Returns:
        (B * S, C, size, size) in the features' dtype, channels_last.
    """
    if sizes is not None:
        areas = sizes.transpose(0, 1).tolist()
        images = [
            _pool([f[i : i + 1, :, :h, :w] for f, (h, w) in zip(features, areas[i], strict=True)], boxes[i : i + 1],
                  levels[i : i + 1], size, scales, sampling_ratio)
            for i in range(len(boxes))
        ]  # fmt: skip
        # Without an image there is nothing to crop.
        return torch.cat(images) if images else _pool(features, boxes, levels, size, scales, sampling_ratio)
    return _pool(features, boxes, levels, size, scales, sampling_ratio)


def _pool(features, boxes, levels, size, scales, sampling_ratio):
    batch, slots = levels.shape
    # Coordinates need more than half precision, so the pooling is done in float32.
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    image = torch.arange(batch, device=boxes.device).repeat_interleave(slots)
    rois = torch.cat([image[:, None], boxes.flatten(0, 1)], dim=1).to(dtype)
    levels = levels.flatten()
    rows = ((levels < 0) | (levels >= len(features))).nonzero().squeeze(1)
    order, parts = [rows], [features[0].new_zeros((len(rows), features[0].shape[1], size, size))]
    for i, (feature, scale) in enumerate(zip(features, scales, strict=True)):
        rows = (levels == i).nonzero().squeeze(1)
        order.append(rows)
        pooled = roi_align(feature.to(dtype), rois[rows], size, scale, sampling_ratio, aligned=True)
        parts.append(pooled.to(feature.dtype))
    return torch.cat(parts)[torch.cat(order).argsort()].contiguous(memory_format=torch.channels_last)
