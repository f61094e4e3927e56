"""Valid areas: the part of padded feature maps that holds images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels.tensors import to_device, valid_mask
from .sampling import cell_sizes


class ValidArea:
    """The cells of one level's maps (B, C, H, W) that hold images, each from its map's top left.

    Attributes:
        sizes: (rows, columns) of each image: cells that hold at least one of its pixels.
        grid: (H, W).
        padded: whether any map has padding. Without it every method returns its input.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]], grid: tuple[int, int], device: torch.device):
        self.sizes = list(sizes)
        self.grid = grid
        self.device = device
        self.padded = any(size != grid for size in self.sizes)

    @property
    def cell_count(self) -> int:
        """Valid cells of all maps."""
        return sum(rows * columns for rows, columns in self.sizes)

    @cached_property
    def cells(self) -> torch.Tensor:
        """(B, 2) int32, ``sizes``."""
        return to_device(self.sizes, self.device)

    @cached_property
    def padding(self) -> torch.Tensor:
        """(B, 1, H, W) bool, the padding mask: True in the padding."""
        return ~valid_mask(self.cells, self.grid)[:, None]

    @cached_property
    def index(self) -> torch.Tensor:
        """(N,) int64, indices of the valid cells among all B * H * W."""
        height, width = self.grid
        images = [
            (np.arange(rows)[:, None] * width + np.arange(columns) + i * height * width).ravel()
            for i, (rows, columns) in enumerate(self.sizes)
        ]
        return to_device(np.concatenate(images), self.device, torch.int64)

    def zero_padding(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) with zeros in the padding."""
        return x.masked_fill(self.padding, 0.0) if self.padded else x

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) -> their valid cells (N, C, 1, 1), image after image."""
        if not self.padded:
            return x
        return x.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, self.index)[:, :, None, None]

    def unpack(self, cells: torch.Tensor) -> torch.Tensor:
        """Valid cells (N, C, 1, 1) -> maps (B, C, H, W) in channels_last memory, padding zero."""
        if not self.padded:
            return cells
        batch, (height, width) = len(self.sizes), self.grid
        empty = cells.new_zeros((batch * height * width, cells.shape[1]))
        return empty.index_copy(0, self.index, cells[:, :, 0, 0]).view(batch, height, width, -1).permute(0, 3, 1, 2)

    def crop(self, x: torch.Tensor, image: int) -> torch.Tensor:
        """(1, C, rows, columns) of one image."""
        rows, columns = self.sizes[image]
        return x[image : image + 1, :, :rows, :columns]

    def join(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Crops (1, C, rows, columns) of all images -> maps (B, C, H, W), padding zero."""
        height, width = self.grid
        return torch.cat([F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2])) for x in images])

    def outside(self, anchors: int) -> torch.Tensor:
        """(B, H * W * anchors) bool: anchors of cells in the padding, in order row, column, anchor."""
        return self.padding.flatten(1).repeat_interleave(anchors, dim=1)


class ValidAreas:
    """Valid areas of a packed batch at any stride.

    Args:
        image_sizes: (height, width) of each image, pixels.
        padded_size: (height, width) of the padded batch, pixels.
        device: of the feature maps.
    """

    def __init__(self, image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int], device: torch.device):
        self.image_sizes = list(image_sizes)
        self.padded_size = padded_size
        self.device = device
        self.padded = any(size != padded_size for size in self.image_sizes)
        self._levels: dict[int, ValidArea] = {}

    def at(self, stride: int) -> ValidArea:
        """The valid area of maps with this stride, in pixels."""
        if stride not in self._levels:
            grid = cell_sizes([self.padded_size], stride)[0]
            self._levels[stride] = ValidArea(cell_sizes(self.image_sizes, stride), grid, self.device)
        return self._levels[stride]


class PackedFeatures(dict):
    """Feature maps of a packed batch by name, zero in the padding.

    Attributes:
        areas: ``ValidAreas`` of the batch.
    """

    def __init__(self, maps: Mapping[str, torch.Tensor], areas: ValidAreas):
        super().__init__(maps)
        self.areas = areas


def areas_of(features: Mapping[str, torch.Tensor]) -> ValidAreas | None:
    """Valid areas of packed feature maps; None for a padded batch, where padding is part of every image."""
    return features.areas if isinstance(features, PackedFeatures) else None


def levels_of(features: Mapping[str, torch.Tensor], strides: Sequence[int]) -> list[ValidArea | None]:
    """The valid area at each stride; None at each for a padded batch."""
    areas = areas_of(features)
    return [None if areas is None else areas.at(stride) for stride in strides]
