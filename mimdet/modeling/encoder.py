"""The MAE pre-trained ViT encoder, fed with a sample of the ConvStem's tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..checkpoint.mae import load_mae
from ..kernels.gather_add_pos.api import gather_add_pos
from .conv_stem import ConvStem
from .pos_embed import PosEmbedCache, sincos_pos_embed_2d
from .sampling import TokenSample, check_ratio, sample_tokens, valid_cells
from .shapes import ImageList
from .vit import init_vit_weights, make_blocks, run_layers

MAE_NORM = partial(nn.LayerNorm, eps=1e-6)


class EncoderOutput(NamedTuple):
    """What the encoder hands on.

    Attributes:
        features: ConvStem feature maps of strides 4, 8 and 16, each (B, C, H, W).
        tokens: (B, K, D) encoded tokens of the kept positions.
        sample: which positions were kept; None when all were.
    """

    features: list[torch.Tensor]
    tokens: torch.Tensor
    sample: TokenSample | None


class MIMDetEncoder(nn.Module):
    """ConvStem, token sampling and the ViT encoder (paper, sections 2.1 and 2.2).

    Args:
        img_size: side of the square picture that the position table is made for, pixels.
        patch_size: stride of a token, pixels.
        in_chans: channels of the picture.
        embed_dim: width of the tokens.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over embed_dim.
        dpr: stochastic depth rate of the last block; rates rise linearly from 0.
        norm_layer: called with embed_dim.
        pretrained: path of a full MAE checkpoint, or None for random weights.
        checkpointing: recompute ConvStem stages and blocks in backward.
        recompute: what else backward computes again: "lean" the outputs of LayerNorm and GELU
            and of the ConvStem's first stage, "none" nothing.
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
        checkpointing: bool = False,
        recompute: str = "lean",
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.patch_embed = ConvStem(
            img_size, patch_size, in_chans, embed_dim, checkpointing=checkpointing, recompute=recompute
        )
        rows = self.patch_embed.grid_size[0]
        self.pos_embed = nn.Parameter(torch.empty(1, rows * rows + 1, embed_dim), requires_grad=False)
        rates = torch.linspace(0, dpr, depth, device="cpu").tolist()
        self.blocks = make_blocks(embed_dim, num_heads, mlp_ratio, rates, norm_layer, recompute)
        self.norm = norm_layer(embed_dim)
        self.apply(init_vit_weights)
        self.pos_embed.data.copy_(sincos_pos_embed_2d(embed_dim, rows))
        self._pos_embed_at = PosEmbedCache()
        if pretrained:
            load_mae(self, pretrained, "encoder")

    def forward(self, images: ImageList, sample_ratio: float, noise: torch.Tensor | None = None) -> EncoderOutput:
        """Encode a batch.

        Args:
            images: normalised pictures, padded to multiples of the patch size.
            sample_ratio: keep ratio in (0, 1].
            noise: (B, L) uniform numbers that choose the tokens; drawn from ``torch.rand`` if None. At ratio
                1.0 nothing is chosen and none are drawn.

        Raises:
            ValueError: ratio outside (0, 1], or noise of another shape.
        """
        check_ratio(sample_ratio)
        features = self.patch_embed(images.tensor)
        batch, dim, *grid = features[-1].shape
        tokens = features[-1].permute(0, 2, 3, 1).reshape(batch, -1, dim)
        pos = self._pos_embed_at(self.pos_embed, tuple(grid))
        sample = None
        if sample_ratio == 1.0:
            tokens = tokens + pos
        else:
            length = tokens.shape[1]
            if noise is None:
                noise = torch.rand(batch, length, device=tokens.device)
            elif noise.shape != (batch, length):
                raise ValueError(f"noise must be {(batch, length)} for a {tuple(grid)} grid, got {tuple(noise.shape)}")
            valid = valid_cells(images.image_sizes, tuple(grid), self.patch_embed.patch_size, tokens.device)
            sample = sample_tokens(noise.to(tokens.device), valid, sample_ratio)
            tokens = gather_add_pos(tokens, pos, sample.keep)
        tokens = run_layers(self.blocks, self.norm, tokens, self.checkpointing)
        return EncoderOutput(features, tokens, sample)
