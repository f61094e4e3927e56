"""Images as a padded batch, and the shapes of feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from ..kernels.tensors import to_device


@dataclass(frozen=True)
class ShapeSpec:
    """Shape of a layer's input: channels, height and width in cells, stride in pixels of the image."""

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None


class ImageList:
    """Images of different sizes as one zero-padded batch.

    Attributes:
        tensor: (B, C, H, W), images in the top left corner.
        image_sizes: B pairs (height, width) in pixels before padding.
    """

    def __init__(self, tensor: torch.Tensor, image_sizes: Sequence[tuple[int, int]]):
        if tensor.ndim != 4 or len(image_sizes) != tensor.shape[0]:
            raise ValueError(
                f"ImageList: tensor must be (B, C, H, W) with one size an image, "
                f"got {tuple(tensor.shape)} and {len(image_sizes)} sizes"
            )
        self.tensor = tensor
        self.image_sizes = [(int(h), int(w)) for h, w in image_sizes]
        for i, (h, w) in enumerate(self.image_sizes):
            if not (1 <= h <= tensor.shape[2] and 1 <= w <= tensor.shape[3]):
                raise ValueError(
                    f"ImageList: image_sizes[{i}] is {h}x{w}, not within 1x1 .. {tensor.shape[2]}x{tensor.shape[3]}"
                )

    def __len__(self) -> int:
        return len(self.image_sizes)

    @cached_property
    def sizes(self) -> torch.Tensor:
        """``image_sizes`` as (B, 2) int32 on the device of ``tensor``."""
        return to_device(self.image_sizes, self.tensor.device)

    @classmethod
    def from_tensors(cls, tensors: Sequence[torch.Tensor], size_divisibility: int = 0) -> ImageList:
        """Batch (C, H, W) tensors, padded with zeros at the bottom and right to a common size.

        Args:
            tensors: at least one; all of one dtype and device.
            size_divisibility: the padded height and width are multiples of it (0: no such condition).
        """
        if not tensors:
            raise ValueError("ImageList: no images given")
        sizes = [(int(t.shape[-2]), int(t.shape[-1])) for t in tensors]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        if size_divisibility > 1:
            height, width = (-(-side // size_divisibility) * size_divisibility for side in (height, width))
        padded = [F.pad(t, (0, width - w, 0, height - h)) for t, (h, w) in zip(tensors, sizes, strict=True)]
        return cls(torch.stack(padded), sizes)
