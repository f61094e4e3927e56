"""The first two stages of ConvNeXt as the stem (Liu et al., 2022; paper, Table 5)."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoint.convnext import load_convnext
from ..kernels.tensors import zero_padding
from .recompute import checkpointed, is_selective
from .vit import Mlp, add_norm, compute_dtype

_EPS = 1e-6


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution, LayerNorm and MLP of each cell, LayerScale, residual; parameters have timm's names."""

    def __init__(self, dim: int, recompute: str = "lean"):
        super().__init__()
        self.recompute = is_selective(recompute)
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, 4 * dim, recompute)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        cells = self.conv_dw(x).permute(0, 2, 3, 1)
        _, rows = add_norm(self.norm, cells.flatten(1, 2), dtype=compute_dtype(x), recompute=self.recompute)
        branch = self.mlp(rows) * self.gamma
        return (x + branch.view(cells.shape).permute(0, 3, 1, 2)).to(x.dtype)


class CellNorm(nn.LayerNorm):
    """LayerNorm over the channels of each cell of a map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        cells = x.permute(0, 2, 3, 1)
        _, rows = add_norm(self, cells.flatten(1, 2), dtype=compute_dtype(x))
        return rows.view(cells.shape).permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
    """Blocks; with ``downsample`` a norm and a 2x2 convolution of stride 2 before them."""

    def __init__(self, c_in: int, c_out: int, depth: int, downsample: bool, recompute: str):
        super().__init__()
        parts = [CellNorm(c_in, eps=_EPS), nn.Conv2d(c_in, c_out, kernel_size=2, stride=2)] if downsample else []
        self.downsample = nn.Sequential(*parts)
        self.blocks = nn.ModuleList(ConvNeXtBlock(c_out, recompute) for _ in range(depth))


class ConvNeXtStem(nn.Module):
    """Features of strides 4 and 8 from ConvNeXt's first two stages, of stride 16 from the third's downsampling.

    For ViT-Base the widths are those of ConvNeXt-Large: 192, 384, 768. The paper takes "configuration / pre-trained
    weights of the first two stages of ConvNeXt-Large" and does not say how it reaches stride 16; here it is the next
    downsampling of ConvNeXt. There is no stochastic depth.

    Args:
        img_size: side of the square image of the position table, pixels.
        patch_size: stride of the last feature; must be 16.
        in_chans: channels of the image.
        embed_dim: channels of stride 16; stride 4 has a quarter of them, stride 8 half.
        depth: blocks of a stage.
        checkpointing: recompute blocks in backward.
        recompute: "lean" recomputes the outputs of LayerNorm and GELU in backward; "none" saves them.
        pretrained: path of weights as timm names them, or None for random ones.

    Raises:
        ValueError: embed_dim is not a multiple of 4, or patch_size is not 16.
        CheckpointError: weights that cannot be read or do not fit.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 3,
        checkpointing: bool = False,
        recompute: str = "lean",
        pretrained: str | None = None,
    ):
        super().__init__()
        if embed_dim % 4 or patch_size != 16:
            raise ValueError(
                f"ConvNeXtStem: embed_dim must be a multiple of 4 and patch_size 16, got {embed_dim} and {patch_size}"
            )
        self.patch_size = patch_size
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.checkpointing = checkpointing
        fine, middle = embed_dim // 4, embed_dim // 2
        self.stem = nn.Sequential(nn.Conv2d(in_chans, fine, kernel_size=4, stride=4), CellNorm(fine, eps=_EPS))
        self.stages = nn.ModuleList(
            [
                ConvNeXtStage(fine, fine, depth, False, recompute),
                ConvNeXtStage(fine, middle, depth, True, recompute),
                ConvNeXtStage(middle, embed_dim, 0, True, recompute),
            ]
        )
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if pretrained:
            load_convnext(self, pretrained)

    def forward(self, x: torch.Tensor, sizes: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Features of strides 4, 8 and 16, finest first.

        Args:
            x: (B, in_chans, H, W), sides multiples of 16.
            sizes: (4, B, 2) rows and columns of each image at strides 2, 4, 8 and 16. If padding of x is
                zero, each image then has the features that it has alone, and padding is zero in all but the last.
        """
        outputs = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            # Convolutions must read zeros in the padding. The 4x4 patches of the stem never cross an image's edge.
            for module in stage.downsample:
                x = module(_zero_padding(x, sizes, i) if isinstance(module, nn.Conv2d) else x)
            for block in stage.blocks:
                x = _zero_padding(x, sizes, i + 1)
                x = checkpointed(block, x) if self.checkpointing and x.requires_grad else block(x)
            outputs.append(x if i == 2 else _zero_padding(x, sizes, i + 1))
        return outputs


def _zero_padding(x: torch.Tensor, sizes: torch.Tensor | None, level: int) -> torch.Tensor:
    return x if sizes is None else zero_padding(x, sizes[level])
