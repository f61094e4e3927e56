"""Baselines of the backbone, with our weights and equal features.

``OriginalBackbone`` follows the released MIMDet step by step; two switches add timm's fused attention and remove
checkpointing. ``CompiledBackbone`` is the same model written for ``torch.compile``. Both share the parameters of a
``MIMDetBackbone`` under its names, except that ``OriginalBackbone`` copies the weights of convolutions into NCHW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import stochastic_depth

from ..modeling import ImageList, MIMDetBackbone
from ..modeling.noise import NoiseSource
from ..modeling.vit import TransformerBlock
from ..pos_embed import PosEmbedCache, interpolate_pos_embed


class _Block(nn.Module):
    """timm's block: two residual branches, each with its LayerNorm and drop path."""

    def __init__(self, ours: TransformerBlock, fused_attention: bool):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = ours.norm1, ours.attn, ours.norm2, ours.mlp
        self.heads = ours.attn.num_heads
        self.drop_prob = ours.drop_path1.drop_prob if ours.drop_path1 else 0.0
        self.fused_attention = fused_attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        drop_path = partial(stochastic_depth, p=self.drop_prob, mode="row", training=self.training)
        x = x + drop_path(self._attention(self.norm1(x)))
        return x + drop_path(self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        qkv = self.attn.qkv(x).reshape(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused_attention:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = (q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5
            x = scores.softmax(dim=-1) @ v
        return self.attn.proj(x.transpose(1, 2).reshape(batch, length, dim))


class _Baseline(nn.Module):
    """Encoder and decoder with the parameters of ``ours``, under the same names."""

    def __init__(self, ours: MIMDetBackbone, fused_attention: bool):
        super().__init__()
        self.sample_ratio, self.inference_sample_ratio = ours.sample_ratio, ours.inference_sample_ratio
        self.noise = NoiseSource("tokens")
        self.size_divisibility = ours.size_divisibility
        self.output_shape = ours.output_shape
        self.encoder, self.decoder = nn.Module(), nn.Module()
        stem = self.encoder.patch_embed = nn.Module()
        stem.proj = nn.ModuleList(self._stage(stage) for stage in ours.encoder.patch_embed.proj)
        self.encoder.pos_embed = ours.encoder.pos_embed
        self.encoder.blocks = nn.ModuleList(_Block(block, fused_attention) for block in ours.encoder.blocks)
        self.encoder.norm = ours.encoder.norm
        for name in ("decoder_embed", "conv_feat_proj", "decoder_pos_embed", "decoder_norm"):
            setattr(self.decoder, name, getattr(ours.decoder, name))
        blocks = (_Block(block, fused_attention) for block in ours.decoder.decoder_blocks)
        self.decoder.decoder_blocks = nn.ModuleList(blocks)

    def _stage(self, ours: nn.Sequential) -> nn.Sequential:
        convolution, norm, _, *last = ours
        channels, is_group = len(norm.weight), isinstance(norm, nn.GroupNorm)
        plain = nn.GroupNorm(1, channels, eps=norm.eps) if is_group else LayerNorm2d(channels, eps=norm.eps)
        plain.weight, plain.bias = norm.weight, norm.bias
        return nn.Sequential(self.convolution(convolution), plain, nn.GELU(), *map(self.convolution, last))

    @staticmethod
    def convolution(ours: nn.Conv2d) -> nn.Conv2d:
        """A convolution of the stem in this baseline's memory layout."""
        return ours

    def forward(self, images: ImageList | torch.Tensor, sample_ratio: float | None = None) -> dict[str, torch.Tensor]:
        """As ``MIMDetBackbone.forward``."""
        if isinstance(images, torch.Tensor):
            images = ImageList(images, [images.shape[-2:]] * images.shape[0])
        if sample_ratio is None:
            sample_ratio = self.sample_ratio if self.training else self.inference_sample_ratio
        c2, c3, c4 = self.features(images, sample_ratio)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": F.max_pool2d(c4, 2)}


class OriginalBackbone(_Baseline):
    """The released algorithm: NCHW, every position embedded and projected, three sorts, int64 gather indices.

    Args:
        ours: backbone whose parameters it uses.
        fused_attention: False as with timm 0.4.12, which the release asks for; True as with today's timm.
        checkpointing: recompute the ConvStem's stages, every block and the last norm in backward, as released,
            but with ``use_reentrant=False``, which PyTorch recommends and which recomputes the same.
    """

    def __init__(self, ours: MIMDetBackbone, fused_attention: bool, checkpointing: bool):
        super().__init__(ours, fused_attention)
        self.checkpointing = checkpointing

    @staticmethod
    def convolution(ours: nn.Conv2d) -> nn.Conv2d:
        """A copy with weights in NCHW: channels_last weights would make its output channels_last."""
        copied = copy.copy(ours)
        weight = torch.empty(ours.weight.shape, dtype=ours.weight.dtype, device=ours.weight.device)
        copied._parameters = {**ours._parameters, "weight": nn.Parameter(weight.copy_(ours.weight.detach()))}
        return copied

    def features(self, images: ImageList, sample_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c2, c3 and c4."""
        x, stem = images.tensor.contiguous(), []
        for stage in self.encoder.patch_embed.proj:
            x = self._run(stage, x)
            stem.append(x)
        grid = tuple(x.shape[-2:])
        padding = self._padding(images, grid)
        x = x.flatten(2).transpose(1, 2)
        x = x + interpolate_pos_embed(self.encoder.pos_embed, grid)
        x, restore = self._sample(x, sample_ratio, padding)
        for block in self.encoder.blocks:
            x = self._run(block, x)
        x = self.decoder.decoder_embed(self.encoder.norm(x))
        batch, kept, dim = x.shape
        fill = self.decoder.conv_feat_proj(stem[-1].flatten(2).transpose(1, 2))
        order = torch.argsort(restore, dim=1)
        fill = torch.gather(fill, 1, order.unsqueeze(-1).repeat(1, 1, dim))
        x = torch.cat([x, fill[:, kept:]], dim=1)
        x = torch.gather(x, 1, restore.unsqueeze(-1).repeat(1, 1, dim))
        x = x + interpolate_pos_embed(self.decoder.decoder_pos_embed, grid)
        for block in self.decoder.decoder_blocks:
            x = self._run(block, x)
        x = self._run(self.decoder.decoder_norm, x)
        return stem[1], stem[2], x.transpose(1, 2).reshape(batch, dim, *grid)

    def _run(self, module: Callable, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(module, x, use_reentrant=False) if self.checkpointing and x.requires_grad else module(x)

    def _padding(self, images: ImageList, grid: tuple[int, int]) -> torch.Tensor:
        """(B, L) bool, True for padding, written image by image."""
        padding = torch.ones(len(images), *grid, dtype=torch.bool, device=images.tensor.device)
        for row, (height, width) in zip(padding, images.image_sizes, strict=True):
            row[: -(-height // 16), : -(-width // 16)] = False
        return padding.flatten(1)

    def _sample(self, x: torch.Tensor, ratio: float, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sampled tokens in order of their noise, and ids_restore."""
        batch, length, dim = x.shape
        noise = self.noise.draw((batch, length), x.device)
        order = torch.argsort(noise.masked_fill(padding, 100), dim=1)
        restore = torch.argsort(order, dim=1)
        ids_keep = order[:, : int(length * ratio)]
        return torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, dim)), restore


class CompiledBackbone(_Baseline):
    """sdpa + torch.compile: channels_last, one sort, the position embedding interpolated once.

    Images must be unpadded.
    """

    def __init__(self, ours: MIMDetBackbone):
        super().__init__(ours, fused_attention=True)
        self._encoder_position, self._decoder_position = PosEmbedCache(), PosEmbedCache()
        self._compiled = torch.compile(self._compute, dynamic=False)

    def features(self, images: ImageList, sample_ratio: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """c2, c3 and c4."""
        x = images.tensor.contiguous(memory_format=torch.channels_last)
        grid = x.shape[-2] // 16, x.shape[-1] // 16
        positions = (
            self._encoder_position(self.encoder.pos_embed, grid),
            self._decoder_position(self.decoder.decoder_pos_embed, grid),
        )
        noise = self.noise.draw((len(images), grid[0] * grid[1]), x.device)
        return self._compiled(x, noise, int(noise.shape[1] * sample_ratio), *positions)

    def _compute(
        self, x: torch.Tensor, noise: torch.Tensor, kept: int, position: torch.Tensor, decoder_position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        stem = []
        for stage in self.encoder.patch_embed.proj:
            x = stage(x)
            stem.append(x)
        batch, dim, *grid = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(batch, -1, dim)
        rows = torch.arange(batch, device=x.device)[:, None]
        order = noise.argsort(dim=1)
        ids_keep, ids_mask = order[:, :kept], order[:, kept:]
        x = tokens[rows, ids_keep] + position.expand(batch, -1, -1)[rows, ids_keep]
        for block in self.encoder.blocks:
            x = block(x)
        x = self.decoder.decoder_embed(self.encoder.norm(x))
        x = torch.cat([x, self.decoder.conv_feat_proj(tokens[rows, ids_mask])], dim=1)
        places = torch.arange(order.shape[1], device=x.device).expand_as(order)
        restore = torch.empty_like(order).scatter_(1, order, places)
        x = x[rows, restore] + decoder_position
        for block in self.decoder.decoder_blocks:
            x = block(x)
        x = self.decoder.decoder_norm(x)
        return stem[1], stem[2], x.reshape(batch, *grid, -1).permute(0, 3, 1, 2)


_BOTTOM_UP = "backbone.bottom_up"
# Name -> baseline of our backbone. "original" is the release: checkpointing and unfused attention. "sdpa" is fused
# attention, which today's timm gives the original too.
IMPLEMENTATIONS: dict[str, Callable[[MIMDetBackbone], nn.Module]] = {
    "ours": lambda ours: ours,
    "ours-checkpointed": lambda ours: checkpointed(ours),
    "original": partial(OriginalBackbone, fused_attention=False, checkpointing=True),
    "original-no-checkpoint": partial(OriginalBackbone, fused_attention=False, checkpointing=False),
    "original-sdpa": partial(OriginalBackbone, fused_attention=True, checkpointing=True),
    "original-sdpa-no-checkpoint": partial(OriginalBackbone, fused_attention=True, checkpointing=False),
    "sdpa-compile": CompiledBackbone,
}


def variant(detector: nn.Module, implementation: str, ratio: float, depth: int) -> nn.Module:
    """``detector`` with another backbone, a keep ratio for every mode and the first ``depth`` decoder blocks.

    Only the modules' dictionaries are copied: all variants share their weights.

    Args:
        implementation: one of ``IMPLEMENTATIONS``.
    """
    backbone = bottom_up(detector)
    blocks = nn.ModuleList(list(backbone.decoder.decoder_blocks)[:depth])
    backbone = with_child(backbone, "decoder.decoder_blocks", blocks)
    backbone.sample_ratio = backbone.inference_sample_ratio = ratio
    return with_child(detector, _BOTTOM_UP, IMPLEMENTATIONS[implementation](backbone))


def bottom_up(detector: nn.Module) -> nn.Module:
    """The backbone below the pyramid."""
    return detector.get_submodule(_BOTTOM_UP)


def with_child(module: nn.Module, path: str, child: nn.Module) -> nn.Module:
    """``module`` with another module at ``path``; modules off the path are shared."""
    copied = _shallow(module)
    head, _, rest = path.partition(".")
    copied._modules[head] = with_child(module._modules[head], rest, child) if rest else child
    return copied


def checkpointed(ours: MIMDetBackbone) -> MIMDetBackbone:
    """The same backbone with the configs' checkpointing."""
    for path in ("encoder", "encoder.patch_embed", "decoder"):
        part = _shallow(ours.get_submodule(path))
        part.checkpointing = True
        ours = with_child(ours, path, part)
    return ours


def _shallow(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
