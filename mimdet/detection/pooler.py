"""Pool the features under boxes from the pyramid level that fits their size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..kernels import roi_align_levels
from ..kernels.roi_align_levels.api import pyramid
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
        pyramid(scales, "pooler")
        self.output_size = output_size
        self.scales = list(scales)
        self.sampling_ratio = sampling_ratio
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(
        self,
        features: Sequence[torch.Tensor],
        boxes: torch.Tensor,
        valid: torch.Tensor,
        areas: ValidAreas | None = None,
    ) -> torch.Tensor:
        """Pool boxes of every image.

        Args:
            features: the levels, (B, C, H, W) each; read without a copy in channels_last memory.
            boxes: (B, S, 4) in pixels of the padded batch.
            valid: (B, S) bool; the others give zeros.
            areas: of a packed batch. ROIAlign then ends at the last row and column of each image, not of the map.

        Returns:
            (B * S, C, output_size, output_size) in the features' dtype and channels_last.
        """
        sizes = None
        if areas is not None and areas.padded:
            sizes = torch.stack([areas.at(round(1 / scale)).cells for scale in self.scales])
        return roi_align_levels(
            features,
            boxes,
            valid,
            self.output_size,
            self.scales,
            self.sampling_ratio,
            canonical_size=self.canonical_box_size,
            canonical_level=self.canonical_level,
            sizes=sizes,
        )
