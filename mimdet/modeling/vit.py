"""What the encoder and the decoder share: transformer blocks and their initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..kernels.add_layer_norm.api import add_layer_norm
from ..kernels.attention_varlen.api import attention_varlen_packed
from ..kernels.bias_gelu.api import bias_gelu
from .recompute import Linear, Remade, checkpointed, is_lean
from .sequences import Sequences


class Pending(NamedTuple):
    """A residual stream whose last branch is still to be added: it stands for ``residual + scale * branch``.

    The addition waits for the LayerNorm that reads the sum, so that both are one pass over memory.

    Attributes:
        residual: (B, N, C), or packed tokens (T, 1, C).
        branch: like residual, or None when nothing is to be added.
        scale: (B,) or (T,), or None for 1.
    """

    residual: torch.Tensor
    branch: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def added(self) -> torch.Tensor:
        """The sum, in the residual's dtype."""
        if self.branch is None:
            return self.residual
        branch = self.branch if self.scale is None else self.branch * self.scale.view(-1, 1, 1)
        return (self.residual + branch).to(self.residual.dtype)

    def normalised(
        self, norm: nn.LayerNorm, dtype: torch.dtype | None = None, lean: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | Remade]:
        """The sum, and ``norm`` of it in ``dtype``, which a ``lean`` reader makes again in backward."""
        total, x = add_layer_norm(*self, norm.weight, norm.bias, norm.eps, dtype=dtype)
        if lean:
            x = Remade(x, partial(_normalised, eps=norm.eps, dtype=dtype), (total, norm.weight, norm.bias))
        return total, x


class DropPath(nn.Module):
    """Stochastic depth: draws which pictures keep a branch (Huang et al., 2016)."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, branch: torch.Tensor, sequences: Sequences) -> torch.Tensor | None:
        """Factors for the rows of a branch, 0 or 1 / keep, one draw a picture; None in eval mode."""
        if not self.training:
            return None
        keep = 1.0 - self.drop_prob
        # The draw of timm's DropPath, number for number.
        kept = branch.new_empty((sequences.batch, 1, 1)).bernoulli_(keep).flatten()
        kept = kept.to(torch.promote_types(kept.dtype, torch.float32))
        kept = kept / keep if keep > 0 else kept
        return kept if sequences.owner is None else kept[sequences.owner]

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class Attention(nn.Module):
    """Multi-head self-attention within each picture's tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor | Remade, sequences: Sequences) -> torch.Tensor:
        """Tokens (*sequences.shape, C) -> the same."""
        qkv = self.qkv(x)
        heads = qkv.flatten(0, 1).unflatten(-1, (3, self.num_heads, -1))
        y = attention_varlen_packed(heads, sequences.cu_seqlens, sequences.max_seqlen)
        return self.proj(y.view(*qkv.shape[:2], -1))


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, recompute: str = "lean"):
        super().__init__()
        self.lean = is_lean(recompute)
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor | Remade) -> torch.Tensor:
        sources = self.fc1(x, add_bias=False), self.fc1.bias
        y = bias_gelu(*sources)
        return self.fc2(Remade(y, bias_gelu, sources) if self.lean else y)


class TransformerBlock(nn.Module):
    """Pre-norm block with stochastic depth; parameters as timm and MAE name them.

    Args:
        dim: width of the tokens.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: stochastic depth rate in [0, 1].
        norm_layer: called with dim; must give an affine LayerNorm.
        recompute: "lean" computes the outputs of LayerNorm and GELU, 6 of the 16 dim that a token would keep for
            backward, a second time there; "none" keeps them.
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
        self.lean = is_lean(recompute)
        for name in ("gamma_1", "gamma_2"):
            gamma = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))
            self.register_parameter(name, gamma)
        self.norm1 = _layer_norm(norm_layer, dim)
        self.attn = Attention(dim, num_heads)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else None
        self.norm2 = _layer_norm(norm_layer, dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), recompute)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else None

    def forward(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        sequences: Sequences | None = None,
        **attention: torch.Tensor,
    ) -> Pending:
        """Takes what ``Pending`` holds, and leaves its own last addition pending. By default each row of the batch is
        a sequence. ``attention`` is what this block's attention takes beside tokens and sequences."""
        sequences = sequences or Sequences.equal(*residual.shape[:2], residual.device)
        state = Pending(residual, branch, scale)
        dtype = compute_dtype(residual)
        for norm, function, gamma, drop_path in (
            (self.norm1, partial(self.attn, sequences=sequences, **attention), self.gamma_1, self.drop_path1),
            (self.norm2, self.mlp, self.gamma_2, self.drop_path2),
        ):
            residual, x = state.normalised(norm, dtype, self.lean)
            branch = function(x)
            if gamma is not None:
                branch = branch * gamma.to(branch.dtype)
            state = Pending(residual, branch, drop_path and drop_path(branch, sequences))
        return state


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
    blocks: Iterable[TransformerBlock],
    norm: nn.LayerNorm,
    x: torch.Tensor,
    checkpointing: bool,
    sequences: Sequences | None = None,
) -> torch.Tensor:
    """``norm`` of tokens (*sequences.shape, C) after all ``blocks``. By default each row of the batch is a sequence.

    With ``checkpointing``, and if gradients flow, each block is computed again in backward, with the random numbers
    it had; between blocks the sum alone is kept.
    """
    sequences = sequences or Sequences.equal(*x.shape[:2], x.device)
    return run_blocks(blocks, Pending(x), checkpointing, sequences).normalised(norm)[1]


def run_blocks(
    blocks: Iterable[TransformerBlock], state: Pending, checkpointing: bool, sequences: Sequences
) -> Pending:
    """What ``run_layers`` does before its norm."""
    for block in blocks:
        if checkpointing and state.residual.requires_grad:
            state = Pending(checkpointed(_run_whole, block, state.added(), sequences))
        else:
            state = block(*state, sequences)
    return state


def compute_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What linear layers compute in: normalised rows written in it need no cast. None means x's own dtype."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def _normalised(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, dtype: torch.dtype | None):
    return add_layer_norm(x, None, None, weight, bias, eps, dtype=dtype)[1]


def _run_whole(block: TransformerBlock, x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    return block(x, sequences=sequences).added()


def _layer_norm(norm_layer: Callable[[int], nn.Module], dim: int) -> nn.LayerNorm:
    norm = norm_layer(dim)
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        raise TypeError(f"transformer: norm_layer must give a LayerNorm with weight and bias, got {norm}")
    return norm
