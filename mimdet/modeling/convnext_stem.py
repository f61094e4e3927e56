"""The first two stages of ConvNeXt as the stem (Liu et al., 2022; paper, Table 5)."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from ..checkpoint.convnext import load_convnext
from ..kernels.tensors import zero_padding
from .recompute import checkpointed


class ConvNeXtStem(nn.Module):
    """Features of strides 4 and 8 from ConvNeXt's first two stages, of stride 16 from the third's downsampling.

    For ViT-Base the widths are those of ConvNeXt-Large: 192, 384, 768. The paper takes "configuration / pre-trained
    weights of the first two stages of ConvNeXt-Large" and does not say how it reaches stride 16; here it is the next
    downsampling of ConvNeXt. There is no stochastic depth. Stages are timm's.

    Args:
        img_size: side of the square image of the position table, pixels.
        patch_size: stride of the last feature; must be 16.
        in_chans: channels of the image.
        embed_dim: channels of stride 16; stride 4 has a quarter of them, stride 8 half.
        depth: blocks of a stage.
        checkpointing: recompute blocks in backward.
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
        pretrained: str | None = None,
    ):
        from timm.layers import LayerNorm, LayerNorm2d  # timm registers hundreds of models on import
        from timm.models.convnext import ConvNeXtStage

        super().__init__()
        if embed_dim % 4 or patch_size != 16:
            raise ValueError(
                f"ConvNeXtStem: embed_dim must be a multiple of 4 and patch_size 16, got {embed_dim} and {patch_size}"
            )
        self.patch_size = patch_size
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.checkpointing = checkpointing
        fine, middle = embed_dim // 4, embed_dim // 2
        norm = partial(LayerNorm2d, eps=1e-6)
        options = {"norm_layer": norm, "norm_layer_cl": partial(LayerNorm, eps=1e-6), "ls_init_value": 1e-6}
        self.stem = nn.Sequential(nn.Conv2d(in_chans, fine, kernel_size=4, stride=4), norm(fine))
        self.stages = nn.ModuleList(
            [
                ConvNeXtStage(fine, fine, stride=1, depth=depth, **options),
                ConvNeXtStage(fine, middle, depth=depth, **options),
                ConvNeXtStage(middle, embed_dim, depth=0, **options),
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
            if i > 0:
                norm, convolution = stage.downsample
                x = convolution(_zero_padding(norm(x), sizes, i))
            for block in stage.blocks:
                x = _zero_padding(x, sizes, i + 1)
                x = checkpointed(block, x) if self.checkpointing and x.requires_grad else block(x)
            outputs.append(x if i == 2 else _zero_padding(x, sizes, i + 1))
        return outputs


def _zero_padding(x: torch.Tensor, sizes: torch.Tensor | None, level: int) -> torch.Tensor:
    return x if sizes is None else zero_padding(x, sizes[level])
