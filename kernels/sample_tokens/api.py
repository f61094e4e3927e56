"""Choice of the tokens that the encoder sees."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import registry
from . import ops, reference


class TokenSample(NamedTuple):
    """A split of each picture's L tokens into kept and dropped ones, both in raster order.

    Attributes:
        keep: (B, K) int64, indices the encoder sees.
        drop: (B, L - K) int64, the others.
        restore: (B, L) int64, where token i stands in ``cat([keep, drop], 1)``.
    """

    keep: torch.Tensor
    drop: torch.Tensor
    restore: torch.Tensor


def sample_tokens(noise: torch.Tensor, valid: torch.Tensor, ratio: float, *, impl: str | None = None) -> TokenSample:
    """Keep the int(L * ratio) tokens of smallest noise, at least one; padding comes last.

    The count is that of the padded grid, so a picture with fewer valid tokens than that contributes padding. Equal
    noise, and padding among itself, is taken in raster order; NaN comes after padding. Every implementation returns
    the same integers, without a sort and without waiting for the GPU. Source: Fang et al., "Unleashing Vanilla Vision
    Transformer with Masked Image Modeling for Object Detection", 2022, section 2.1.

    Args:
        noise: (B, L) uniform numbers, any float dtype; any strides.
        valid: (B, L) bool, False for padding.
        ratio: keep ratio in (0, 1].
        impl: see ``mimdet.kernels.selector``.

    Raises:
        TypeError: noise is not of a float dtype, or valid not bool.
        ValueError: ratio outside (0, 1], shapes or devices that do not fit together.
        KernelUnavailableError: ``impl`` names what cannot run.
    """
    if not noise.is_floating_point():
        raise TypeError(f"sample_tokens: noise must be of a float dtype, got {noise.dtype}")
    if valid.dtype != torch.bool:
        raise TypeError(f"sample_tokens: valid must be bool, got {valid.dtype}")
    if noise.dim() != 2 or valid.shape != noise.shape:
        shapes = f"{tuple(noise.shape)} and {tuple(valid.shape)}"
        raise ValueError(f"sample_tokens: noise and valid must both be (B, L), got {shapes}")
    if valid.device != noise.device:
        raise ValueError(f"sample_tokens: valid is on {valid.device}, noise on {noise.device}")
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"sample_tokens: ratio must be in (0, 1], got {ratio}")
    length = noise.shape[1]
    count = min(max(1, int(length * ratio)), length)
    impl = registry.choose(ops.NAME, impl, noise.device.type, noise.dtype)
    noise = noise.detach()
    if impl == "eager":
        return TokenSample(*reference.sample_tokens(noise, valid, count))
    return TokenSample(*ops.run(noise.float(), valid, count, impl))
