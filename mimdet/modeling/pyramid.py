"""Features of strides 4 and 8 from the tokens of a ViT instead of the stem (paper, Table 8)."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.tensors import zero_padding
from .conv_stem import GroupNormGELU
from .encoder import EncoderOutput


class UpsampledTokens(nn.Module):
    """c2 and c3 from intermediate tokens of the encoder, by transposed convolutions of stride 2 (El-Nouby et al.,
    "XCiT", 2021; Li et al., "Benchmarking Detection Transfer Learning with Vision Transformers", 2021).

    c2 takes two convolutions, with GroupNorm over whole samples and GELU between them, as in the ConvStem. The paper
    names no norm; this one is the same for an image alone and in a packed batch.

    Args:
        embed_dim: width of the tokens, and of the features.
    """

    def __init__(self, embed_dim: int = 768):
        super().__init__()
        self.c2_first, self.c2_second, self.c3 = (nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2) for _ in range(3))
        self.c2_norm = GroupNormGELU(embed_dim, eps=1e-6)

    def forward(self, encoded: EncoderOutput) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, embed_dim, H, W) of strides 4 and 8; in a packed batch padding is zero."""
        first, second = (encoded.map(tokens) for tokens in encoded.tapped)
        if encoded.sizes is None:
            return self.c2_second(self.c2_norm(self.c2_first(first))), self.c3(second)
        _, fine, coarse, _ = encoded.sizes
        c2 = self.c2_second(self.c2_norm(self.c2_first(first), coarse))
        return tuple(zero_padding(x, sizes) for x, sizes in ((c2, fine), (self.c3(second), coarse)))
