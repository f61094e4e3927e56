"""A plain ViT as a detector's backbone: windowed and global attention, features of four strides."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ...checkpoint.mae import load_mae
from ...pos_embed import sincos_pos_embed_2d
from ..sequences import Sequences
from ..shapes import ImageList, ShapeSpec
from ..vit import add, compute_dtype, draw_drop_path, run_blocks
from .block import BiasedBlock, RelativePositionBias, window_partition, window_reverse

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class PatchEmbed(nn.Module):
    """Square patches as tokens."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) -> (B, H / patch_size, W / patch_size, embed_dim)."""
        return self.proj(x).permute(0, 2, 3, 1)


class BenchmarkingViTDet(nn.Module):
    """ViT for images of one size. Attention is windowed, but global in the last block of each quarter.

    Quarter i ends in feature s<i>, of 1/4, 1/2, 1 and 2 times the stride of the patches, by transposed convolutions or
    max pooling. Tokens have a trainable absolute position embedding. All windowed blocks share one relative position
    bias, all global blocks another.

    Args:
        window_size: side of a window, tokens; divides the grid.
        with_cp: recompute blocks in backward.
        pretrained: path of a MAE checkpoint, with decoder or without; None for random weights.
        stop_grad_conv1: freeze the patch embedding.
        sincos_pos_embed: initialize the position embedding with sin-cos, [sin, cos] of the row before those of the
            column, also where ``pretrained`` has one.
        zero_pos_embed: initialize it with zeros, whatever ``pretrained`` and ``sincos_pos_embed`` say.
        img_size: side of the images, pixels.
        patch_size: side of a patch, pixels.
        in_chans: channels of the image.
        embed_dim: width of the tokens.
        depth: number of blocks, a multiple of 4.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over embed_dim.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0. Windows count as samples.
        norm_layer: called with embed_dim.
        init_values, beit_qkv_bias: see ``TransformerBlock`` and ``BiasedAttention``.
        recompute: "lean" recomputes the outputs of LayerNorm and GELU in backward, "none" saves them.

    Raises:
        ValueError: sizes that do not divide.
    """

    out_features = ("s0", "s1", "s2", "s3")

    def __init__(
        self,
        window_size: int,
        with_cp: bool = False,
        pretrained: str | None = None,
        stop_grad_conv1: bool = False,
        sincos_pos_embed: bool = False,
        zero_pos_embed: bool = False,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.LayerNorm] = LAYER_NORM,
        init_values: float | None = None,
        beit_qkv_bias: bool = False,
        recompute: str = "lean",
    ):
        super().__init__()
        _check_sizes(window_size, img_size, patch_size, embed_dim, depth, num_heads)
        self.window_size = window_size
        self.with_cp = with_cp
        self.img_size = img_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.grid_size = rows, columns = img_size // patch_size, img_size // patch_size
        self.size_divisibility = 2 * patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        options = {
            "mlp_ratio": mlp_ratio,
            "norm_layer": norm_layer,
            "recompute": recompute,
            "init_values": init_values,
        }
        self.blocks = nn.ModuleList(
            BiasedBlock(embed_dim, num_heads, beit_qkv_bias, drop_path=rate, **options) for rate in rates
        )
        self.ms_adaptor = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2),
                    nn.GroupNorm(32, embed_dim),
                    nn.GELU(),
                    nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2),
                ),
                nn.ConvTranspose2d(embed_dim, embed_dim, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ]
        )
        self.windowed_rel_pos_bias = RelativePositionBias((window_size, window_size), num_heads)
        self.global_rel_pos_bias = RelativePositionBias(self.grid_size, num_heads)
        self._init_weights()
        fixed = sincos_pos_embed or zero_pos_embed
        if pretrained:
            load_mae(self, pretrained, "benchmarking", keep=("pos_embed",) if fixed else ())
        with torch.no_grad():
            if zero_pos_embed:
                self.pos_embed.zero_()
            elif sincos_pos_embed:
                column, row = sincos_pos_embed_2d(embed_dim, rows)[:, 1:].chunk(2, dim=2)
                self.pos_embed.copy_(torch.cat([row, column], dim=2))
        if stop_grad_conv1:
            self.patch_embed.requires_grad_(False)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        finest = self.patch_size // 4
        return {n: ShapeSpec(channels=self.embed_dim, stride=finest * 2**i) for i, n in enumerate(self.out_features)}

    def forward(self, images: ImageList | torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps of a batch.

        Args:
            images: normalized images, (B, C, img_size, img_size); padding counts as image.

        Returns:
            s0, s1, s2, s3: (B, embed_dim, H / stride, W / stride) each.

        Raises:
            ValueError: images of another size.
        """
        x = images if isinstance(images, torch.Tensor) else images.tensor
        if x.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(
                f"BenchmarkingViTDet: images must be {self.img_size}x{self.img_size}, got "
                f"{x.shape[-2]}x{x.shape[-1]}: let FixedSizeCrop be among the augmentations, or set img_size"
            )
        x = self.patch_embed(x) + self.pos_embed.unflatten(1, self.grid_size)
        dtype = compute_dtype(x) or x.dtype
        # Position biases once for all blocks: at 1024 pixels the global one is as large as attention's logits.
        local_bias, global_bias = self.windowed_rel_pos_bias(dtype), self.global_rel_pos_bias(dtype)
        batch, tokens, window = len(x), self.grid_size[0] * self.grid_size[1], self.window_size**2
        images = Sequences.equal(batch, tokens, x.device)
        windows = Sequences.equal(batch * tokens // window, window, x.device)
        # One draw for all blocks: global ones take the numbers of the first windows, one for each image.
        drop_path = draw_drop_path(self.blocks, x, windows)
        quarter = len(self.blocks) // 4
        outputs = {}
        for i, (name, adaptor) in enumerate(zip(self.out_features, self.ms_adaptor, strict=True)):
            *local_blocks, global_block = self.blocks[i * quarter : (i + 1) * quarter]
            *local_factors, factors = drop_path[i * quarter : (i + 1) * quarter]
            if local_blocks:
                x = window_partition(x, self.window_size)
                x = add(*run_blocks(local_blocks, x, self.with_cp, windows, local_factors, bias=local_bias))
                x = window_reverse(x, self.window_size, *self.grid_size)
            factors = tuple(f if f is None else f[:batch] for f in factors)
            x = run_blocks([global_block], x.flatten(1, 2), self.with_cp, images, [factors], bias=global_bias)
            x = add(*x).unflatten(1, self.grid_size)
            outputs[name] = adaptor(x.permute(0, 3, 1, 2))
        return outputs

    def _init_weights(self) -> None:
        _truncated_normal(self.pos_embed, 0.02, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _truncated_normal(module.weight, 0.02, 1)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                # LeCun's variance, 1 / fan-in; 0.8796 is the std of a normal variable truncated at two.
                _truncated_normal(module.weight, module.weight[0].numel() ** -0.5 / 0.87962566103423978, 2)
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for number, block in enumerate(self.blocks, start=1):
                for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                    weight.div_((2 * number) ** 0.5)


def _truncated_normal(tensor: torch.Tensor, std: float, cut: float) -> None:
    """Fill with normal numbers of mean 0, truncated at ``cut`` times ``std``."""
    nn.init.trunc_normal_(tensor, std=std, a=-cut * std, b=cut * std)


def _check_sizes(window: int, image: int, patch: int, dim: int, depth: int, heads: int) -> None:
    if patch % 4 or image % (2 * patch) or (image // patch) % window:
        raise ValueError(
            f"BenchmarkingViTDet: img_size {image} must be a multiple of 2 * patch_size and of window_size * "
            f"patch_size, and patch_size of 4, got patch_size {patch} and window_size {window}"
        )
    if depth % 4:
        raise ValueError(f"BenchmarkingViTDet: depth must be a multiple of 4, got {depth}")
    if dim % heads or dim % 32:
        raise ValueError(f"BenchmarkingViTDet: embed_dim {dim} must be a multiple of num_heads {heads} and of 32")
