"""Transformer blocks of the encoder and the decoder, and their initial weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

import torch
from torch import nn

from ..kernels import add_layer_norm, attention_varlen_packed, bias_gelu
from ..kernels.tensors import to_device
from .recompute import Recomputed, RecomputeLinear, checkpointed, is_selective
from .sequences import Sequences

# Drop path factors of a block's two branches, (rows,) each; None where nothing is dropped.
Factors = tuple[torch.Tensor | None, torch.Tensor | None]


def add_norm(
    norm: nn.LayerNorm,
    hidden: torch.Tensor,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | Recomputed]:
    """The residual stream ``residual + scale * hidden`` and its ``norm``, in one pass over memory.

    Args:
        hidden: (B, N, C), or packed tokens (T, 1, C); the residual stream itself where ``residual`` is None.
        residual: like hidden.
        scale: (B,) or (T,), drop path factors; None for 1.
        dtype: of the normalized tokens; None for the stream's.
        recompute: return the normalized tokens as ``Recomputed``.
    """
    branch = None if residual is None else hidden
    stream = hidden if residual is None else residual
    stream, x = add_layer_norm(stream, branch, scale, norm.weight, norm.bias, norm.eps, dtype=dtype)
    if recompute:
        x = Recomputed(x, partial(_layer_norm, eps=norm.eps, dtype=dtype), (stream, norm.weight, norm.bias))
    return stream, x


def add(hidden: torch.Tensor, residual: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
    """``residual + scale * hidden`` in the residual's dtype: the residual stream without a norm after it."""
    if residual is None:
        return hidden
    hidden = hidden if scale is None else hidden * scale.view(-1, 1, 1)
    return (residual + hidden).to(residual.dtype)


class DropPath(nn.Module):
    """The rate of a branch's stochastic depth (Huang et al., 2016); ``draw_drop_path`` draws for all branches."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def draw_drop_path(blocks: Iterable[TransformerBlock], x: torch.Tensor, sequences: Sequences) -> list[Factors]:
    """Drop path factors of both branches of each block, in one draw.

    Args:
        blocks: their rates; those in eval mode are not drawn for.
        x: tokens, for their device and dtype.
        sequences: of the tokens.

    Returns:
        For each block two tensors (rows,), 0 or 1 / (1 - rate), one number for each image; None where nothing is
        dropped.
    """
    branches = [branch for block in blocks for branch in (block.drop_path1, block.drop_path2)]
    drops = [branch is not None and branch.training for branch in branches]
    factors = iter(())
    if any(drops):
        keep = [1.0 - branch.drop_prob for branch, drop in zip(branches, drops, strict=True) if drop]
        dtype = torch.promote_types(x.dtype, torch.float32)
        rates, scales = to_device([keep, [1.0 / k if k > 0 else 0.0 for k in keep]], x.device, dtype)[:, :, None]
        drawn = torch.bernoulli(rates.expand(-1, sequences.batch)) * scales
        factors = iter((drawn if sequences.owner is None else drawn[:, sequences.owner]).unbind(0))
    by_branch = [next(factors) if drop else None for drop in drops]
    return list(zip(by_branch[::2], by_branch[1::2], strict=True))


class Attention(nn.Module):
    """Multi-head self-attention within each image's tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = RecomputeLinear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor | Recomputed, sequences: Sequences) -> torch.Tensor:
        """Tokens (*sequences.shape, C) -> (*sequences.shape, C)."""
        qkv = self.qkv(x)
        heads = qkv.flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        y = attention_varlen_packed(heads, sequences.cu_seqlens, sequences.max_seqlen)
        return self.proj(y.view(*qkv.shape[:2], -1))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, recompute: str = "lean"):
        super().__init__()
        self.recompute = is_selective(recompute)
        self.fc1 = RecomputeLinear(dim, hidden_dim)
        self.fc2 = RecomputeLinear(hidden_dim, dim)

    def forward(self, x: torch.Tensor | Recomputed) -> torch.Tensor:
        sources = self.fc1(x, add_bias=False), self.fc1.bias
        y = bias_gelu(*sources)
        return self.fc2(Recomputed(y, bias_gelu, sources) if self.recompute else y)


class TransformerBlock(nn.Module):
    """Pre-norm block with stochastic depth; parameters as timm and MAE name them.

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: stochastic depth rate in [0, 1].
        norm_layer: called with dim; must return an affine LayerNorm.
        recompute: "lean" recomputes the outputs of LayerNorm and GELU in backward, which saves 6 of a token's 16 * dim
            saved elements; "none" saves them.
        init_values: initial LayerScale of both branches (Touvron et al., 2021); None for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.LayerNorm] = nn.LayerNorm,
        recompute: str = "lean",
        init_values: float | None = None,
    ):
        super().__init__()
        self.recompute = is_selective(recompute)
        for name in ("gamma_1", "gamma_2"):
            gamma = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))
            self.register_parameter(name, gamma)
        self.norm1 = _make_norm(norm_layer, dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else None
        self.norm2 = _make_norm(norm_layer, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), recompute)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else None

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        sequences: Sequences | None = None,
        drop_path: Factors | None = None,
        **attention: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(hidden, residual, scale) -> (hidden, residual, scale): the next norm adds up ``residual + scale * hidden``.

        Args:
            hidden, residual, scale: as ``add_norm`` takes them.
            sequences: which tokens attend to each other; by default each row of the batch is a sequence.
            drop_path: of ``draw_drop_path``, the factors of both branches; by default drawn here.
            attention: further arguments of this block's attention.
        """
        sequences = sequences or Sequences.equal(*hidden.shape[:2], hidden.device)
        scale1, scale2 = drop_path or draw_drop_path([self], hidden, sequences)[0]
        dtype = compute_dtype(hidden if residual is None else residual)
        residual, x = add_norm(self.norm1, hidden, residual, scale, dtype, self.recompute)
        hidden = _layer_scale(self.attn(x, sequences, **attention), self.gamma_1)
        residual, x = add_norm(self.norm2, hidden, residual, scale1, dtype, self.recompute)
        hidden = _layer_scale(self.mlp(x), self.gamma_2)
        return hidden, residual, scale2


def make_blocks(
    dim: int,
    num_heads: int,
    mlp_ratio: float,
    drop_path: Sequence[float],
    norm_layer: Callable[[int], nn.LayerNorm],
    recompute: str = "lean",
) -> nn.ModuleList:
    """Blocks for ``run_layers``, one for each stochastic depth rate in ``drop_path``."""
    if dim % num_heads:
        raise ValueError(f"transformer: width {dim} is not divisible by {num_heads} heads")
    return nn.ModuleList(TransformerBlock(dim, num_heads, mlp_ratio, rate, norm_layer, recompute) for rate in drop_path)


def init_vit_weights(module: nn.Module) -> None:
    """MAE's initial weights for linear and LayerNorm modules; use with ``Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def run_layers(
    blocks: Collection[TransformerBlock],
    norm: nn.LayerNorm,
    x: torch.Tensor,
    checkpointing: bool,
    sequences: Sequences | None = None,
    drop_path: Iterable[Factors] | None = None,
) -> torch.Tensor:
    """``norm`` of tokens (*sequences.shape, C) after all ``blocks``. By default each row of the batch is a sequence."""
    sequences = sequences or Sequences.equal(*x.shape[:2], x.device)
    return add_norm(norm, *run_blocks(blocks, x, checkpointing, sequences, drop_path), compute_dtype(x))[1]


def run_blocks(
    blocks: Collection[TransformerBlock],
    x: torch.Tensor,
    checkpointing: bool,
    sequences: Sequences,
    drop_path: Iterable[Factors] | None = None,
    **attention,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(hidden, residual, scale) after all ``blocks``; ``attention`` are further arguments of their attention.

    ``drop_path`` has the factors of each block, by default of one draw. ``checkpointing`` recomputes each block in
    backward, with the same factors; only the tokens between blocks are saved. It has no effect without gradients.
    """
    state = x, None, None
    drop_path = draw_drop_path(blocks, x, sequences) if drop_path is None else drop_path
    for block, factors in zip(blocks, drop_path, strict=True):
        if checkpointing and state[0].requires_grad:
            function = partial(_run_block, block, sequences, factors, **attention)
            state = checkpointed(function, add(*state)), None, None
        else:
            state = block(*state, sequences, factors, **attention)
    return state


def compute_dtype(x: torch.Tensor) -> torch.dtype | None:
    """autocast's dtype for linear layers, in which norms write their output; None without autocast."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype | None):
    return add_layer_norm(x, None, None, weight, bias, eps, dtype=dtype)[1]


def _layer_scale(hidden: torch.Tensor, gamma: torch.Tensor | None) -> torch.Tensor:
    return hidden if gamma is None else hidden * gamma.to(hidden.dtype)


def _run_block(
    block: TransformerBlock, sequences: Sequences, drop_path: Factors, x: torch.Tensor, **attention
) -> torch.Tensor:
    return add(*block(x, None, None, sequences, drop_path, **attention))


def _make_norm(norm_layer: Callable[[int], nn.Module], dim: int) -> nn.LayerNorm:
    norm = norm_layer(dim)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise TypeError(f"transformer: norm_layer must return a LayerNorm with weight and bias, got {norm}")
    return norm
