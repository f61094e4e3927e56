"""The stems that the encoder can begin with."""

from __future__ import annotations

from torch import nn

from .conv_stem import ConvStem
from .convnext_stem import ConvNeXtStem

STEMS = ("conv", "convnext")


def make_stem(
    stem: str,
    img_size: int,
    patch_size: int,
    in_chans: int,
    embed_dim: int,
    checkpointing: bool,
    recompute: str,
    pretrained: str | None = None,
) -> nn.Module:
    """The stem of that name; it has ``grid_size`` and ``patch_size`` and gives features of strides 4, 8 and 16.

    Raises:
        ValueError: an unknown name, or pre-trained weights for "conv", which has none.
    """
    if stem not in STEMS:
        raise ValueError(f"encoder: stem {stem!r} is unknown; choose from {', '.join(STEMS)}")
    sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim}
    memory = {"checkpointing": checkpointing, "recompute": recompute}
    if stem == "convnext":
        return ConvNeXtStem(**sizes, **memory, pretrained=pretrained)
    if pretrained:
        raise ValueError("encoder: stem_pretrained needs stem 'convnext': the ConvStem is never pre-trained")
    return ConvStem(**sizes, **memory)
