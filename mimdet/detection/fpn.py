"""Feature pyramid network (Lin et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling.areas import PackedFeatures, ValidArea, areas_of, levels_of
from ..modeling.shapes import ShapeSpec
from .layers import Conv2d, get_norm, xavier_fill


class LastLevelMaxPool(nn.Module):
    """p6 by taking every second cell of p5."""

    num_levels = 1
    in_feature = "p5"

    def forward(self, x: torch.Tensor, areas: Sequence[ValidArea | None] = (None,)) -> list[torch.Tensor]:
        """[p6]. Zero padding stays zero, so ``areas`` is not needed."""
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """p6 and p7 by 3x3 convolutions of stride 2, p7 from p6 after ReLU (Lin et al. 2017, RetinaNet).

    Args:
        in_channels: channels of ``in_feature``.
        out_channels: channels of both levels.
        in_feature: input of p6, an output of the backbone or a level of the pyramid.
    """

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "c5"):
        super().__init__()
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        xavier_fill(self.p6)
        xavier_fill(self.p7)

    def forward(self, x: torch.Tensor, areas: Sequence[ValidArea | None] = (None, None)) -> list[torch.Tensor]:
        """p6 and p7 of ``in_feature``; ``areas`` are those of both."""
        p6 = _zero_padding(self.p6(x), areas[0])
        return [p6, _zero_padding(self.p7(F.relu(p6)), areas[1])]


def _zero_padding(x: torch.Tensor, area: ValidArea | None) -> torch.Tensor:
    return x if area is None else area.zero_padding(x)


class FPN(nn.Module):
    """Top-down pyramid over a backbone's features; outputs are named p<log2 of stride>.

    ``PackedFeatures`` of the backbone give ``PackedFeatures``: norms see each image alone, and padding stays zero.

    Args:
        bottom_up: backbone with ``output_shape()``; ``forward`` hands its arguments to it.
        in_features: names of its outputs, finest first, each of twice the stride of the one before.
        out_channels: channels of every output.
        norm: norm of lateral and output convolutions; "" for none, which gives them a bias.
        top_block: makes coarser levels from its ``in_feature`` (an output of the backbone or a level), or None.

    Raises:
        ValueError: unknown in_features (of the FPN or its top block), or strides that do not double.
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
        top_block: nn.Module | None = None,
    ):
        super().__init__()
        shapes = bottom_up.output_shape()
        if missing := [name for name in in_features if name not in shapes]:
            raise ValueError(f"FPN: the backbone has no outputs {missing}, only {list(shapes)}")
        strides = [shapes[name].stride for name in in_features]
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(f"FPN: strides of {list(in_features)} must double, got {strides}")
        self.in_features = list(in_features)
        self.levels = [int(math.log2(stride)) for stride in strides]
        for name, level in zip(in_features, self.levels, strict=True):
            kwargs = {"bias": norm == ""}
            lateral = Conv2d(shapes[name].channels, out_channels, 1, norm=get_norm(norm, out_channels), **kwargs)
            output = Conv2d(out_channels, out_channels, 3, padding=1, norm=get_norm(norm, out_channels), **kwargs)
            xavier_fill(lateral)
            xavier_fill(output)
            self.add_module(f"fpn_lateral{level}", lateral)
            self.add_module(f"fpn_output{level}", output)
        known = [*shapes, *(f"p{level}" for level in self.levels)]
        if top_block is not None and top_block.in_feature not in known:
            raise ValueError(f"FPN: the top block's in_feature {top_block.in_feature!r} is none of {', '.join(known)}")
        self.top_block = top_block
        self.bottom_up = bottom_up
        self.size_divisibility = max(strides[-1], getattr(bottom_up, "size_divisibility", 1))
        extra = top_block.num_levels if top_block is not None else 0
        self._levels_out = self.levels + [self.levels[-1] + i + 1 for i in range(extra)]
        self._out_channels = out_channels

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        return {f"p{n}": ShapeSpec(channels=self._out_channels, stride=2**n) for n in self._levels_out}

    def forward(self, *args, **kwargs) -> dict[str, torch.Tensor]:
        """The backbone's arguments -> {"p2": (B, out_channels, H/4, W/4), ...}."""
        features = self.bottom_up(*args, **kwargs)
        areas = levels_of(features, [2**n for n in self._levels_out])
        outputs: list[torch.Tensor] = []
        x = None
        for i, (name, level) in reversed(list(enumerate(zip(self.in_features, self.levels, strict=True)))):
            lateral = getattr(self, f"fpn_lateral{level}")(features[name], areas[i])
            # Upsampling fills padding: a coarse cell at the edge of an image may reach beyond it.
            up = None if x is None else F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = lateral if up is None else _zero_padding(lateral + up, areas[i])
            outputs.insert(0, getattr(self, f"fpn_output{level}")(x, areas[i]))
        if self.top_block is not None:
            levels = {f"p{n}": out for n, out in zip(self.levels, outputs, strict=True)}
            outputs += self.top_block((levels | features)[self.top_block.in_feature], areas[len(levels) :])
        pyramid = {f"p{n}": out for n, out in zip(self._levels_out, outputs, strict=True)}
        areas = areas_of(features)
        return pyramid if areas is None else PackedFeatures(pyramid, areas)
