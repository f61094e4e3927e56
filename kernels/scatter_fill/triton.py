"""Assembly of the decoder's input on a GPU through Triton."""

from __future__ import annotations

import torch

from ..triton_rows import gather_rows, scatter_rows


def launch_scatter_fill_fwd(
    kept: torch.Tensor, fill: torch.Tensor, ids_restore: torch.Tensor, pos: torch.Tensor, y: torch.Tensor
) -> None:
    """kept (B, K, D) and fill (B, F, D) with contiguous rows, contiguous ids_restore (B, L), pos (L, D)
    -> y (B, L, D)."""
    gather_rows(kept, fill, ids_restore, pos, y, pos_at_source=False)


def launch_scatter_fill_bwd(
    dy: torch.Tensor, ids_restore: torch.Tensor, dkept: torch.Tensor, dfill: torch.Tensor
) -> None:
    """Contiguous dy (B, L, D) and ids_restore (B, L) -> dkept (B, K, D), dfill (B, F, D)."""
    scatter_rows(dy, ids_restore, dkept, dfill)
