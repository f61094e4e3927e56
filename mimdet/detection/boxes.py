"""Boxes as (..., 4) float tensors x0, y0, x1, y1 in pixels, and their coding as deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# A box may grow by at most 1000 / 16 in one step; beyond it exp() overflows.
SCALE_CLAMP = math.log(1000.0 / 16)


def clip_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes cut to a picture of (height, width)."""
    height, width = size
    x = boxes[..., 0::2].clamp(min=0, max=width)
    y = boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def nonempty(boxes: torch.Tensor) -> torch.Tensor:
    """(...,) bool: width and height both above zero."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def scale_boxes(boxes: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Boxes of a picture of size ``old`` (height, width) in a picture of size ``new``."""
    sy, sx = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor([sx, sy, sx, sy])


class Box2BoxTransform:
    """R-CNN's box coding: shifts by the reference's size, log of the size ratio, each times a weight.

    Args:
        weights: of dx, dy, dw, dh.
        scale_clamp: upper bound of dw and dh when decoding.
    """

    def __init__(self, weights: Sequence[float], scale_clamp: float = SCALE_CLAMP):
        self.weights = tuple(float(w) for w in weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Deltas (..., 4) that take boxes ``source`` of positive size to ``target``."""
        source_size = source[..., 2:] - source[..., :2]
        target_size = target[..., 2:] - target[..., :2]
        shift = (target[..., :2] + 0.5 * target_size) - (source[..., :2] + 0.5 * source_size)
        deltas = torch.cat([shift / source_size, torch.log(target_size / source_size)], dim=-1)
        return deltas * deltas.new_tensor(self.weights)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Boxes (..., K * 4) in float32 from deltas (..., K * 4) about boxes (..., 4)."""
        shape = deltas.shape
        deltas = deltas.float().reshape(*shape[:-1], shape[-1] // 4, 4) / deltas.new_tensor(
            self.weights, dtype=torch.float32
        )
        boxes = boxes.float().unsqueeze(-2)
        size = boxes[..., 2:] - boxes[..., :2]
        centre = boxes[..., :2] + 0.5 * size + deltas[..., :2] * size
        half = 0.5 * size * deltas[..., 2:].clamp(max=self.scale_clamp).exp()
        return torch.cat([centre - half, centre + half], dim=-1).reshape(shape)
