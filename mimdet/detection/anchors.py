"""Anchor boxes of the pyramid's levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class DefaultAnchorGenerator(nn.Module):
    """Anchors of every size and aspect ratio at every cell of every level.

    Args:
        sizes: for each level its sizes, square roots of the area, pixels.
        aspect_ratios: height over width, the same list for every level (or one list a level).
        strides: of each level, pixels.
        offset: of the center within a cell, in cells, in [0, 1).

    Raises:
        ValueError: lists of different length, or an offset outside [0, 1).
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float] | Sequence[Sequence[float]],
        strides: Sequence[int],
        offset: float = 0.5,
    ):
        super().__init__()
        if not 0.0 <= offset < 1.0:
            raise ValueError(f"anchor offset must be in [0, 1), got {offset}")
        if isinstance(aspect_ratios[0], (int, float)):
            aspect_ratios = [aspect_ratios] * len(sizes)
        if not len(sizes) == len(aspect_ratios) == len(strides):
            raise ValueError(
                f"anchors: {len(sizes)} levels of sizes, {len(aspect_ratios)} of ratios, {len(strides)} strides"
            )
        self.strides = list(strides)
        self.offset = offset
        self._levels = len(sizes)
        for i, level in enumerate(zip(sizes, aspect_ratios, strict=True)):
            self.register_buffer(f"cell{i}", self._cell(*level), persistent=False)
        self._cache: dict[tuple, list[torch.Tensor]] = {}

    @property
    def cells(self) -> list[torch.Tensor]:
        """(A, 4) anchors about the origin, of each level."""
        return [getattr(self, f"cell{i}") for i in range(self._levels)]

    @property
    def num_anchors(self) -> list[int]:
        """Anchors at a cell of each level."""
        return [len(cell) for cell in self.cells]

    @staticmethod
    def _cell(sizes: Sequence[float], ratios: Sequence[float]) -> torch.Tensor:
        rows = []
        for size in sizes:
            for ratio in ratios:
                width = (size * size / ratio) ** 0.5
                height = ratio * width
                rows.append([-width / 2, -height / 2, width / 2, height / 2])
        return torch.tensor(rows)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """(B, C, H, W) of each level -> (H * W * A, 4) float32 anchors of each, in order row, column, anchor."""
        key = (*(tuple(f.shape[-2:]) for f in features), features[0].device)
        if key not in self._cache:
            if len(self._cache) >= 64:
                self._cache.pop(next(iter(self._cache)))
            with torch.inference_mode(False):
                self._cache[key] = [
                    self._grid(f, s, c) for f, s, c in zip(features, self.strides, self.cells, strict=True)
                ]
        return self._cache[key]

    def _grid(self, feature: torch.Tensor, stride: int, cell: torch.Tensor) -> torch.Tensor:
        height, width = feature.shape[-2:]
        y = (torch.arange(height, device=feature.device, dtype=torch.float32) + self.offset) * stride
        x = (torch.arange(width, device=feature.device, dtype=torch.float32) + self.offset) * stride
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        shifts = torch.stack([xx, yy, xx, yy], dim=-1).view(-1, 1, 4)
        return (shifts + cell).view(-1, 4)
