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

    Only the map of each row's class is computed: no loss and no detection reads the others.

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

    def forward(self, x: torch.Tensor, classes: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """(N, C, S, S) and the class (N,) int64 of each row -> float32 logits (N, 2S, 2S) of that class.

        Rows that are not ``valid`` (N,) bool enter no statistics; None: all are.
        """
        for name in self._convs:
            x = getattr(self, name)(x, valid=valid)
        x = F.relu(self.deconv(x)).permute(0, 2, 3, 1)
        # F.embedding, not indexing: its gradient has one order of sums on a GPU too.
        weight, bias = (
            F.embedding(classes, p.flatten(1)) for p in (self.predictor.weight, self.predictor.bias[:, None])
        )
        return torch.baddbmm(bias.unsqueeze(2), x.flatten(1, 2), weight.unsqueeze(2)).view(x.shape[:3]).float()


def mask_loss(logits: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean binary cross entropy of foreground rows; 0, with gradient, without rows.

    Args:
        logits: (N, S, S), of each row's class.
        targets: (N, S, S) bool.
        valid: (N,) bool, the rows that count; None: all.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    if valid is None:
        return loss.sum() / max(loss.numel(), 1)
    loss = torch.where(valid[:, None, None], loss, 0.0)
    return loss.sum() / (valid.sum() * logits.shape[1:].numel()).clamp(min=1)
