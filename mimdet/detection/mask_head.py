"""Mask head (He et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling.shapes import ShapeSpec
from .layers import Conv2d, get_norm, msra_fill, normal_fill


class MaskRCNNConvUpsampleHead(nn.Module):
    """3x3 convolutions, a stride 2 deconvolution, and a 1x1 layer with one map for each class.

    Args:
        input_shape: channels of the pooled features.
        num_classes: number of maps.
        conv_dims: channels of each convolution; the last entry is the deconvolution's.
        conv_norm: norm of the convolutions; "" for none, which gives them a bias.
    """

    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str | Callable[[int], nn.Module] = "",
    ):
        super().__init__()
        *dims, up = conv_dims
        channels = input_shape.channels
        self._convs = [f"mask_fcn{i}" for i in range(1, len(dims) + 1)]
        for name, dim in zip(self._convs, dims, strict=True):
            norm = get_norm(conv_norm, dim)
            conv = Conv2d(channels, dim, 3, padding=1, bias=norm is None, norm=norm, activation=F.relu)
            msra_fill(conv)
            self.add_module(name, conv)
            channels = dim
        self.deconv = nn.ConvTranspose2d(channels, up, kernel_size=2, stride=2)
        msra_fill(self.deconv)
        self.predictor = nn.Conv2d(up, num_classes, 1)
        normal_fill(self.predictor, std=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, S, S) -> logits (N, num_classes, 2S, 2S)."""
        for name in self._convs:
            x = getattr(self, name)(x)
        return self.predictor(F.relu(self.deconv(x)))


def class_logits(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The map of each row's class: (N, K, S, S), (N,) int64 -> (N, S, S) float32."""
    return logits[torch.arange(len(classes), device=logits.device), classes].float()


def mask_loss(logits: torch.Tensor, classes: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean binary cross entropy of each foreground row's class map; without rows 0, with a gradient for DDP.

    Args:
        logits: (N, K, S, S).
        classes: (N,) int64.
        targets: (N, S, S) bool.
    """
    if not len(classes):
        return logits.sum() * 0.0
    return F.binary_cross_entropy_with_logits(class_logits(logits, classes), targets.float())
