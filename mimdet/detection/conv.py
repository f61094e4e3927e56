"""Convolution with an optional norm and activation, and the initial weights of detection heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..modeling.areas import ValidArea
from .norm import normalise


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by ``norm`` and ``activation`` if given; the norm's keys are under ``norm.``.

    With the maps' valid area, the norm sees that alone, and the result is zero elsewhere: what the next convolution
    reads beyond an image is then what it reads beyond the map of that image alone.
    """

    def __init__(
        self,
        *args,
        norm: nn.Module | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x: torch.Tensor, area: ValidArea | None = None) -> torch.Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = normalise(self.norm, x, area)
        if self.activation is not None:
            x = self.activation(x)
        return x if area is None else area.zero_padding(x)


def xavier_fill(module: nn.Module) -> None:
    """Uniform weights of variance 1 / fan_in, zero bias (Caffe2's XavierFill, as FPN uses)."""
    nn.init.kaiming_uniform_(module.weight, a=1)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def msra_fill(module: nn.Module) -> None:
    """Normal weights of variance 2 / fan_out, zero bias (Caffe2's MSRAFill)."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def normal_fill(module: nn.Module, std: float) -> None:
    """Normal weights of the given deviation, zero bias."""
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
