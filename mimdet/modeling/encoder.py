"""The MAE pre-trained ViT encoder over a sample of the ConvStem's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoint.mae import load_mae
from ..kernels import gather_add_pos
from ..kernels.tensors import to_device, zero_padding
from ..pos_embed import PosEmbedCache, sincos_pos_embed_2d
from .conv_stem import ConvStem
from .convnext_stem import ConvNeXtStem
from .noise import NoiseSource
from .recompute import is_checkpointing
from .sampling import TokenSplit, cell_sizes, check_ratio, sampling_noise, split_packed, split_padded
from .shapes import ImageList
from .vit import add, draw_drop_path, init_vit_weights, make_blocks, run_blocks, run_layers
from .window_sequences import split_windows

_STEMS = ("conv", "convnext")
MAE_NORM = partial(nn.LayerNorm, eps=1e-6)


class EncoderOutput(NamedTuple):
    """Output of the encoder: the decoder's and the pyramid's input.

    Attributes:
        features: ConvStem feature maps of strides 4, 8 and 16, each (B, C, H, W).
        tokens: (*split.encoder.shape, D) encoded tokens.
        split: which tokens were encoded, and which the decoder fills in.
        tapped: intermediate tokens, after the blocks in ``taps``.
        sizes: (4, B, 2) int32, rows and columns of packed images at strides 2, 4, 8 and 16; None for a padded batch.
    """

    features: list[torch.Tensor]
    tokens: torch.Tensor
    split: TokenSplit
    tapped: tuple[torch.Tensor, ...] = ()
    sizes: torch.Tensor | None = None

    def map(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens``, or one of ``tapped``, as a map (B, D, H, W) of stride 16. The encoder must have seen all."""
        split, (batch, _, *grid) = self.split, self.features[-1].shape
        if split.ids_keep is not None:
            tokens = gather_add_pos(tokens.reshape(*split.ids_keep.shape, -1), None, split.ids_restore)
        return split.to_map(tokens.reshape(*split.decoder.shape, -1), batch, tuple(grid))


class MIMDetEncoder(nn.Module):
    """ConvStem, token sampling and the ViT encoder (paper, sections 2.1 and 2.2).

    Args:
        img_size: side of the square image of the position table, pixels.
        patch_size: stride of a token, pixels.
        in_chans: channels of the image.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over embed_dim.
        dpr: stochastic depth rate of the last block; rates rise linearly from 0.
        norm_layer: called with embed_dim.
        pretrained: path of a full MAE checkpoint, or None for random weights.
        checkpointing: recompute ConvStem stages and blocks in backward. "auto": ``AutoRecompute`` decides.
        recompute: selective recomputation in backward: "lean" of the outputs of LayerNorm and GELU, also in the
            ConvStem's first stage; "none" of nothing; "auto" as
            for ``checkpointing``.
        stem: "conv", or "convnext" for the first two stages of ConvNeXt (paper, Table 5).
        stem_norm: norm of stem "conv": "group", as the original, or "layer"; see ``ConvStem``.
        stem_pretrained: path of ConvNeXt weights as timm names them, or None for random ones.
        window: side, in tokens, of the windows of attention, which needs all tokens; None for global attention
            (paper, Table 8).
        taps: after how many blocks intermediate tokens are returned too, ascending (timm's ``out_indices`` plus 1).

    Raises:
        ValueError: an unknown ``stem`` or ``recompute``, a window below 1, taps out of order, sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dpr: float = 0.0,
        norm_layer: Callable[[int], nn.LayerNorm] = MAE_NORM,
        pretrained: str | None = None,
        checkpointing: bool | str = "auto",
        recompute: str = "auto",
        stem: str = "conv",
        stem_norm: str = "group",
        stem_pretrained: str | None = None,
        window: int | None = None,
        taps: Sequence[int] = (),
    ):
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"encoder: window must be at least 1, got {window}")
        self.window = window
        self.taps = tuple(taps)
        if any(b <= a for a, b in pairwise((0, *self.taps, depth))):
            raise ValueError(f"encoder: taps must rise within 1 .. {depth - 1}, got {list(taps)}")
        self.recomputation = checkpointing, recompute
        self.checkpointing = checkpointing = is_checkpointing(checkpointing)
        sizes = img_size, patch_size, in_chans, embed_dim
        self.patch_embed = _make_stem(stem, *sizes, checkpointing, recompute, stem_norm, stem_pretrained)
        rows = self.patch_embed.grid_size[0]
        self.pos_embed = nn.Parameter(torch.empty(1, rows * rows + 1, embed_dim), requires_grad=False)
        rates = torch.linspace(0, dpr, depth, device="cpu").tolist()
        self.blocks = make_blocks(embed_dim, num_heads, mlp_ratio, rates, norm_layer, recompute)
        self.norm = norm_layer(embed_dim)
        for part in (self.blocks, self.norm):
            part.apply(init_vit_weights)
        self.pos_embed.data.copy_(sincos_pos_embed_2d(embed_dim, rows))
        self._pos_embed_at = PosEmbedCache()
        self.noise = NoiseSource("tokens")
        if pretrained:
            load_mae(self, pretrained, "encoder")

    def forward(
        self,
        images: ImageList,
        sample_ratio: float,
        *,
        sampling: str = "random",
        packed: bool = False,
    ) -> EncoderOutput:
        """Encode a batch.

        Args:
            images: normalized images, padded to multiples of the patch size.
            sample_ratio: keep ratio in (0, 1].
            sampling: "random", or "grid" for a checkerboard.
            packed: each image is encoded as if it were alone, whatever its padding holds.

        Raises:
            ValueError: ratio outside (0, 1], a ratio below 1 with windows, fixed noise of another shape, or a ratio
                that "grid" does not support.
        """
        check_ratio(sample_ratio)
        if self.window and sample_ratio != 1.0:
            raise ValueError(f"encoder: windows hold every token: sample_ratio must be 1, got {sample_ratio}")
        x, stage_sizes = _with_zero_padding(images) if packed else (images.tensor, None)
        features = self.patch_embed(x, stage_sizes)
        batch, dim, *grid = features[-1].shape
        grid, device = tuple(grid), features[-1].device
        noise = sampling_noise(sampling, batch, grid, sample_ratio, self.noise, device)
        sizes = cell_sizes(images.image_sizes, self.patch_embed.patch_size)
        if self.window:
            split = split_windows(sizes, grid, self.window, packed, device)
        else:
            split = (split_packed if packed else split_padded)(sizes, grid, sample_ratio, noise, device)
        tokens = features[-1].permute(0, 2, 3, 1).reshape(1 if packed else batch, -1, dim)
        if packed:
            pos = self._pos_embed_at.padded(self.pos_embed, sizes, grid)
        else:
            pos = self._pos_embed_at(self.pos_embed, grid)
        tokens = tokens + pos if split.ids_keep is None else gather_add_pos(tokens, pos, split.ids_keep)
        tokens = tokens.reshape(*split.encoder.shape, dim)
        drop_path = draw_drop_path(self.blocks, tokens, split.encoder)
        tapped, begin = [], 0
        for end in self.taps:
            part = self.blocks[begin:end]
            tokens = add(*run_blocks(part, tokens, self.checkpointing, split.encoder, drop_path[begin:end]))
            tapped.append(tokens)
            begin = end
        rest = self.blocks[begin:]
        tokens = run_layers(rest, self.norm, tokens, self.checkpointing, split.encoder, drop_path[begin:])
        return EncoderOutput(features, tokens, split, tuple(tapped), stage_sizes)


def _with_zero_padding(images: ImageList) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with zeros in their padding; (4, B, 2) int32 rows and columns of each at strides 2, 4, 8 and 16."""
    sizes = to_device([cell_sizes(images.image_sizes, 2**i) for i in range(5)], images.tensor.device)
    return zero_padding(images.tensor, sizes[0]), sizes[1:]


def _make_stem(
    stem: str,
    img_size: int,
    patch_size: int,
    in_chans: int,
    embed_dim: int,
    checkpointing: bool,
    recompute: str,
    norm: str = "group",
    pretrained: str | None = None,
) -> nn.Module:
    """The stem ``stem``, with attributes ``grid_size`` and ``patch_size``; it returns features of strides 4, 8, 16.

    Raises:
        ValueError: an unknown name, a norm for "convnext", or pre-trained weights for "conv", which has none.
    """
    if stem not in _STEMS:
        raise ValueError(f"encoder: stem {stem!r} is unknown; choose from {', '.join(_STEMS)}")
    sizes = {"img_size": img_size, "patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim}
    if stem == "convnext":
        if norm != "group":
            raise ValueError(f"encoder: stem_norm {norm!r} needs stem 'conv'; the norms of ConvNeXt are LayerNorm")
        return ConvNeXtStem(**sizes, checkpointing=checkpointing, pretrained=pretrained)
    if pretrained:
        raise ValueError("encoder: stem_pretrained needs stem 'convnext': the ConvStem is never pre-trained")
    return ConvStem(**sizes, checkpointing=checkpointing, recompute=recompute, norm=norm)
