"""The transformer block whose attention adds a bias to its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..recompute import Recomputed, RecomputeLinear
from ..sequences import Sequences
from ..vit import Attention, TransformerBlock

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
            self.qkv = RecomputeLinear(dim, 3 * dim, bias=False)
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor | Recomputed, sequences: Sequences, bias: torch.Tensor) -> torch.Tensor:
        """``sequences`` are the rows of x; ``bias``: (1, heads, N, N) in the dtype that linear layers compute in."""
        qkv = self.qkv(x)
        if self.beit_qkv_bias:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(_BACKENDS):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).flatten(2))


class BiasedBlock(TransformerBlock):
    """``TransformerBlock`` with ``BiasedAttention``, whose bias is given at every call.

    Args:
        dim, num_heads: of the tokens.
        beit_qkv_bias: see ``BiasedAttention``.
        options: of ``TransformerBlock``.
    """

    def __init__(self, dim: int, num_heads: int, beit_qkv_bias: bool = False, **options):
        super().__init__(dim, num_heads, **options)
        self.attn = BiasedAttention(dim, num_heads, beit_qkv_bias)
