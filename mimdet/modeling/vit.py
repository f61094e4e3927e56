"""What the encoder and the decoder share: transformer blocks and their initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint


def make_blocks(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path: Sequence[float],
    norm_layer: Callable[[int], nn.Module],
) -> nn.ModuleList:
    """Pre-norm blocks (timm's), one for each stochastic depth rate in ``drop_path``."""
    if dim % num_heads:
        raise ValueError(f"transformer: width {dim} is not divisible by {num_heads} heads")
    return nn.ModuleList(
        Block(dim, num_heads, mlp_ratio, qkv_bias=True, drop_path=rate, norm_layer=norm_layer) for rate in drop_path
    )


def init_vit_weights(module: nn.Module) -> None:
    """MAE's initial weights for linear and LayerNorm modules; use with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def run_layers(layers: Iterable[nn.Module], x: torch.Tensor, checkpointing: bool) -> torch.Tensor:
    """Apply layers in turn, recomputing each in backward when ``checkpointing`` is on and gradients flow."""
    for layer in layers:
        x = checkpoint(layer, x, use_reentrant=False) if checkpointing and x.requires_grad else layer(x)
    return x
