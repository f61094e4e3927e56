"""``mimdet::group_norm_gelu`` and its backward: mean and rstd are (B,), one for each sample."""

from __future__ import annotations

from .. import image_norm

NAME = "group_norm_gelu"

image_norm.register(NAME, statistics=lambda x: (x.shape[0],))
