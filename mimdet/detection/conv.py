"""Convolution with an optional norm and activation, and the initial weights of detection heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` followed by ``norm`` and ``activation`` if given; the norm's keys are under ``norm.``."""

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


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
