"""The transformer block whose attention adds a bias to its logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..recompute import Linear, Remade
from ..sequences import Sequences
from ..vit import Attention, Pending, TransformerBlock, _compute_dtype, _normalised

# Not cuDNN's, which PyTorch prefers on Hopper: its backward gives the bias no gradient.
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


class BiasedAttention(Attention):
    """Multi-head self-attention over (B, N, C) with a bias added to the scaled logits.

    Args:
        dim: C.
        num_heads: attention heads.
        beit_qkv_bias: queries and values have a bias, keys have none, as in BEiT.
    """

    def __init__(self, dim: int, num_heads: int, beit_qkv_bias: bool = False):
        super().__init__(dim, num_heads)
        self.beit_qkv_bias = beit_qkv_bias
        if beit_qkv_bias:
            self.qkv = Linear(dim, 3 * dim, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor | Remade, bias: torch.Tensor) -> torch.Tensor:
        """``bias``: (1, heads, N, N) in the dtype that linear layers compute in."""
        qkv = self.qkv(x)
        if self.beit_qkv_bias:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(_BACKENDS):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2))


class BiasedBlock(TransformerBlock):
    """``TransformerBlock`` with ``BiasedAttention`` and, optionally, learned scales of its branches.

    Args:
        dim, num_heads: of the tokens.
        init_values: initial LayerScale of both branches (Touvron et al., 2021); None for none.
        beit_qkv_bias: see ``BiasedAttention``.
        options: of ``TransformerBlock``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        init_values: float | None = None,
        beit_qkv_bias: bool = False,
        **options,
    ):
        super().__init__(dim, num_heads, **options)
        self.attn = BiasedAttention(dim, num_heads, beit_qkv_bias)
        for name in ("gamma_1", "gamma_2"):
            gamma = None if init_values is None else nn.Parameter(torch.full((dim,), float(init_values)))
            self.register_parameter(name, gamma)

    def forward(
        self,
        residual: torch.Tensor,
        branch: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        *,
        bias: torch.Tensor,
    ) -> Pending:
        """Takes what ``Pending`` holds and the attention's bias; leaves its own last addition pending."""
        state = Pending(residual, branch, scale)
        pictures = Sequences.equal(*residual.shape[:2], residual.device)
        dtype = _compute_dtype(residual)
        for norm, function, gamma, drop_path in (
            (self.norm1, partial(self.attn, bias=bias), self.gamma_1, self.drop_path1),
            (self.norm2, self.mlp, self.gamma_2, self.drop_path2),
        ):
            residual, x = state.normalised(norm, dtype)
            if self.lean:
                sources = residual, norm.weight, norm.bias
                x = Remade(x, partial(_normalised, eps=norm.eps, dtype=dtype), sources)
            branch = function(x)
            if gamma is not None:
                branch = branch * gamma.to(branch.dtype)
            state = Pending(residual, branch, drop_path and drop_path(branch, pictures))
        return state

    def whole(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> the same, nothing pending."""
        return self(x, bias=bias).added()
