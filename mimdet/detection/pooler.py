"""Pool the features under boxes from the pyramid level that fits their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torchvision.ops import roi_align

from ..modeling.areas import ValidAreas


class ROIPooler(nn.Module):
    """ROIAlign with half-pixel alignment over a pyramid (Lin et al. 2017, equation 1, picks the level).

    Args:
        output_size: side of the pooled map, cells.
        scales: of each level, 1 / stride, finest first, each half of the one before.
        sampling_ratio: sample points along a side of a cell; 0 adapts to the box.
        pooler_type: only "ROIAlignV2" (aligned).
        canonical_box_size: boxes of this side, pixels, go to ``canonical_level``.
        canonical_level: log2 of that level's stride.

    Raises:
        ValueError: another pooler type, or scales that do not halve.
    """

    def __init__(
        self,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int = 0,
        pooler_type: str = "ROIAlignV2",
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ):
        super().__init__()
        if pooler_type != "ROIAlignV2":
            raise ValueError(f"pooler_type must be 'ROIAlignV2', got {pooler_type!r}")
        levels = [-math.log2(scale) for scale in scales]
        if any(b != a + 1 for a, b in pairwise(levels)) or levels[0] % 1:
            raise ValueError(f"pooler: scales must be 1/4, 1/8, ... each half of the one before, got {list(scales)}")
        self.output_size = output_size
        self.scales = list(scales)
        self.sampling_ratio = sampling_ratio
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level
        self.min_level, self.max_level = int(levels[0]), int(levels[-1])

    def assign_levels(self, boxes: torch.Tensor) -> torch.Tensor:
        """(N, 4) boxes -> (N,) int64 index into the levels."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(self.canonical_level + torch.log2(side / self.canonical_box_size + 1e-8))
        return level.clamp(self.min_level, self.max_level).to(torch.int64) - self.min_level

    def forward(
        self, features: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor], areas: ValidAreas | None = None
    ) -> torch.Tensor:
        """Pool boxes of every image.

        Args:
            features: the levels, (B, C, H, W) each.
            boxes: B tensors (N_i, 4) in pixels of the padded batch.
            areas: of a packed batch. ROIAlign then ends at the last row and column of each image, not of the map.

        Returns:
            (sum N_i, C, output_size, output_size) in the features' dtype, in the order of ``boxes``.
        """
        if areas is not None and areas.padded:
            levels = [areas.at(round(1 / scale)) for scale in self.scales]
            maps = [[a.crop(f, i) for a, f in zip(levels, features, strict=True)] for i in range(len(boxes))]
            return torch.cat([self._pool(levels, [box]) for levels, box in zip(maps, boxes, strict=True)])
        return self._pool(features, boxes)

    def _pool(self, features: Sequence[torch.Tensor], boxes: Sequence[torch.Tensor]) -> torch.Tensor:
        batch_index = torch.cat([b.new_full((len(b), 1), float(i)) for i, b in enumerate(boxes)])
        rois = torch.cat([batch_index, torch.cat(list(boxes))], dim=1)
        level = self.assign_levels(rois[:, 1:])
        order, parts = [], []
        for i, (feature, scale) in enumerate(zip(features, self.scales, strict=True)):
            rows = (level == i).nonzero().squeeze(1)
            order.append(rows)
            # ROIAlign in float32: half precision is too coarse for coordinates.
            pooled = roi_align(
                feature.float(),
                rois[rows].float(),
                self.output_size,
                scale,
                self.sampling_ratio,
                aligned=True,
            )
            parts.append(pooled.to(feature.dtype))
        return torch.cat(parts)[torch.cat(order).argsort()]
