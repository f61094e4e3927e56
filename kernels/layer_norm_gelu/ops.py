"""``mimdet::layer_norm_gelu`` and its backward: mean and rstd are (B, H, W), one for each position."""

from __future__ import annotations

from .. import image_norm

NAME = "layer_norm_gelu"

image_norm.register(NAME, statistics=lambda x: (x.shape[0], *x.shape[2:]))
