"""The MAE pre-trained decoder that completes the sampled tokens to a full feature map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from ..checkpoint.mae import load_mae
from ..kernels import gather_add_pos, scatter_fill
from ..pos_embed import PosEmbedCache, sincos_pos_embed_2d
from .encoder import EncoderOutput
from .recompute import is_checkpointing
from .vit import init_vit_weights, make_blocks, run_layers

FILL = ("conv_stem", "mask_token")


class MIMDetDecoder(nn.Module):
    """Fills unsampled positions and runs MAE's decoder (paper, Table 6).

    Args:
        img_size: side of the square image of the position table, pixels.
        patch_size: stride of a token, pixels.
        embed_dim: width of the encoder's tokens.
        decoder_embed_dim: width of the decoder.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over decoder_embed_dim.
        dpr: stochastic depth rate of every block.
        norm_layer: called with decoder_embed_dim.
        pretrained: path of a full MAE checkpoint, or None for random weights.
        checkpointing: recompute blocks in backward. "auto": as the encoder, ``AutoRecompute`` decides.
        recompute: selective recomputation in backward: "lean" of the outputs of LayerNorm and GELU, "none" of nothing;
            "auto" as for ``checkpointing``.
        fill: input at unsampled positions: "conv_stem", its projected features, or "mask_token", MAE's [MASK] token.

    Raises:
        ValueError: an unknown ``fill`` or ``recompute``, or sizes that do not divide.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        decoder_embed_dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dpr: float = 0.0,
        norm_layer: Callable[[int], nn.LayerNorm] = nn.LayerNorm,
        pretrained: str | None = None,
        checkpointing: bool | str = "auto",
        recompute: str = "auto",
        fill: str = "conv_stem",
    ):
        super().__init__()
        if fill not in FILL:
            raise ValueError(f"decoder: fill {fill!r} is unknown; choose from {', '.join(FILL)}")
        self.recomputation = checkpointing, recompute
        self.checkpointing = is_checkpointing(checkpointing)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        if fill == "mask_token":
            self.conv_feat_proj = None
            self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_embed_dim))
        else:
            self.conv_feat_proj = nn.Linear(embed_dim, decoder_embed_dim)
        rows = img_size // patch_size
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, rows * rows + 1, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = make_blocks(decoder_embed_dim, num_heads, mlp_ratio, [dpr] * depth, norm_layer, recompute)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.apply(init_vit_weights)
        self.decoder_pos_embed.data.copy_(sincos_pos_embed_2d(decoder_embed_dim, rows))
        self._pos_embed_at = PosEmbedCache()
        if pretrained:
            load_mae(self, pretrained, "decoder")

    def forward(self, encoded: EncoderOutput) -> torch.Tensor:
        """Encoder output -> (B, decoder_embed_dim, H, W) of stride 16, in channels_last memory. In a packed batch
        padding is zero."""
        split, (batch, _, *grid) = encoded.split, encoded.features[-1].shape
        x = self.decoder_embed(encoded.tokens)
        if split.valid_index is None:
            pos = self._pos_embed_at(self.decoder_pos_embed, tuple(grid))
        else:
            pos = self._pos_embed_at.packed(self.decoder_pos_embed, split.sizes)
        fill = self._fill(encoded.features[-1], split.ids_mask, x.dtype)
        if split.ids_keep is None:
            x = torch.cat([x, fill], dim=1) + pos
        else:
            x = scatter_fill(x.reshape(*split.ids_keep.shape, -1), fill, split.ids_restore, pos)
        x = x.reshape(*split.decoder.shape, -1)
        x = run_layers(self.decoder_blocks, self.decoder_norm, x, self.checkpointing, split.decoder)
        return split.to_map(x, batch, tuple(grid))

    def _fill(self, stem: torch.Tensor, ids_mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """(G, D, decoder_embed_dim) for the tokens to fill in."""
        groups, count = (len(stem), 0) if ids_mask is None else ids_mask.shape
        if self.conv_feat_proj is None:
            return self.mask_token.to(dtype).expand(groups, count, -1)
        if ids_mask is None:
            # DDP needs zero gradients, not None, for conv_feat_proj.
            return self.conv_feat_proj(stem.new_empty((groups, 0, stem.shape[1])))
        tokens = stem.permute(0, 2, 3, 1).reshape(groups, -1, stem.shape[1])
        return self.conv_feat_proj(gather_add_pos(tokens, None, ids_mask))
