"""The convolutional stem that replaces ViT's patch embedding (paper, section 2.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from ..kernels import group_norm_gelu, layer_norm_gelu
from .convolution import RecomputeConv2d
from .recompute import Recomputed, checkpointed, is_selective

_NORMS = ("group", "layer")


class GroupNormGELU(nn.GroupNorm):
    """GroupNorm over whole samples and exact GELU in one operation; parameters and keys are GroupNorm's.

    Args:
        channels: C.
        eps: added to the variance.
        recompute: return a ``Recomputed``, which only a ``RecomputeConv2d`` accepts; None for never.
    """

    def __init__(self, channels: int, eps: float, recompute: bool | None = None):
        super().__init__(1, channels, eps=eps)
        self.recompute = recompute

    def forward(self, x: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor | Recomputed:
        """(B, C, H, W) -> (B, C, H, W). ``sizes`` (B, 2) are the rows and columns of each sample: statistics cover
        them alone, and padding becomes zero, whatever it holds."""
        return _norm_gelu(group_norm_gelu, self, x, sizes)


class LayerNormGELU(nn.LayerNorm):
    """LayerNorm over the channels of each cell and exact GELU in one operation. Arguments: ``GroupNormGELU``."""

    def __init__(self, channels: int, eps: float, recompute: bool | None = None):
        super().__init__(channels, eps=eps)
        self.recompute = recompute

    def forward(self, x: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor | Recomputed:
        """(B, C, H, W) -> (B, C, H, W); outside ``sizes`` (B, 2) it is zero, whatever x holds there."""
        return _norm_gelu(layer_norm_gelu, self, x, sizes)


def _norm_gelu(
    operation: Callable[..., torch.Tensor], norm: nn.Module, x: torch.Tensor, sizes: torch.Tensor | None
) -> torch.Tensor | Recomputed:
    sources = x, norm.weight, norm.bias
    function = partial(operation, eps=norm.eps, sizes=sizes)
    y = function(*sources)
    return Recomputed(y, function, sources) if norm.recompute else y


class Stage(nn.Sequential):
    """Convolution, norm, and further layers."""

    def forward(self, x: torch.Tensor | Recomputed, sizes: torch.Tensor | None = None) -> torch.Tensor | Recomputed:
        """(B, C, H, W) -> (B, C', H/2, W/2); the norm takes ``sizes`` (B, 2)."""
        convolution, norm, *rest = self
        x = norm(convolution(x), sizes)
        for module in rest:
            x = module(x)
        return x


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2, each with a norm and exact GELU; the last adds a 1x1.

    GroupNorm's statistics cover the padded images, as in the original, whose released weights were trained so. With
    ``sizes`` they cover each image alone.

    Args:
        img_size: side of the square image of the position table, pixels.
        patch_size: stride of the last stage, pixels; must equal 2**depth.
        in_chans: channels of the image.
        embed_dim: channels of the last stage; each earlier stage has half of the next.
        depth: number of stages.
        norm: "group" for GroupNorm(1), as the original, or "layer" for LayerNorm over the channels of each cell. Both
            have the same keys and shapes, but weights trained with one do not fit the other.
        norm_layer: optional norm of the last output, called with embed_dim.
        checkpointing: recompute stages in backward: all but the first, or with "lean" all but the first two.
        recompute: "lean" recomputes the first stage's norm and GELU in backward, whose output is the largest
            activation; "none" saves it.

    Raises:
        ValueError: an unknown norm, embed_dim does not divide into the stages, or patch_size is not 2**depth.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 4,
        norm: str = "group",
        norm_layer: Callable[[int], nn.Module] | None = None,
        checkpointing: bool = False,
        recompute: str = "lean",
    ):
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"ConvStem: norm {norm!r} is unknown; choose from {', '.join(_NORMS)}")
        if embed_dim % 2 ** (depth - 1):
            raise ValueError(f"ConvStem: embed_dim {embed_dim} must be divisible by {2 ** (depth - 1)}")
        if patch_size != 2**depth:
            raise ValueError(f"ConvStem: {depth} stages of stride 2 make patch_size {2**depth}, got {patch_size}")
        self.patch_size = patch_size
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.checkpointing = checkpointing
        make_norm = LayerNormGELU if norm == "layer" else GroupNormGELU
        widths = [in_chans, *(embed_dim // 2**i for i in reversed(range(depth)))]
        self.proj = nn.ModuleList(
            Stage(
                RecomputeConv2d(c_in, c_out, kernel_size=3, stride=2, padding=1),
                make_norm(c_out, eps=1e-6, recompute=is_selective(recompute) if depth > 1 and i == 0 else None),
                nn.Identity(),  # state_dict: the original has its GELU here, so the 1x1 is number 3
            )
            for i, (c_in, c_out) in enumerate(pairwise(widths))
        )
        self.proj[-1].append(nn.Conv2d(embed_dim, embed_dim, kernel_size=1))
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor, sizes: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Features of strides 4, 8 and 16, finest first.

        Args:
            x: (B, in_chans, H, W), sides multiples of 16.
            sizes: (depth, B, 2) rows and columns of each image after each stage. If padding of x is zero, each image
                then has the features that it has alone, and padding is zero in all but the last, which adds a bias.
        """
        outputs = []
        for i, stage in enumerate(self.proj):
            recompute = self.checkpointing and isinstance(x, torch.Tensor) and x.requires_grad
            stage_sizes = None if sizes is None else sizes[i]
            x = checkpointed(stage, x, stage_sizes) if recompute else stage(x, stage_sizes)
            outputs.append(x)
        outputs[-1] = self.norm(outputs[-1])
        return outputs[1:]
