"""A fixed number of random foreground and background candidates per picture."""

from __future__ import annotations

import torch


def subsample_labels(
    labels: torch.Tensor, num_samples: int, positive_fraction: float, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose up to ``num_samples`` candidates of each row, at most a fraction of them foreground.

    One uniform number a candidate decides: the smallest are chosen, the earlier one on a tie. Background
    fills what foreground leaves. Shapes do not depend on the data, so nothing waits for the device.

    Args:
        labels: (B, N) integers, 1 foreground, 0 background, anything else never chosen.
        num_samples: wanted from each row.
        positive_fraction: upper bound of the foreground's share.
        noise: (B, N) uniform numbers.

    Returns:
        index: (B, P + num_samples) int64, P foreground slots first; entries of unused slots are arbitrary.
        used: (B, P + num_samples) bool.
    """
    count = labels.shape[1]
    num_positive = int(num_samples * positive_fraction)
    # 2**-48 per index leaves the order of float32 draws alone and makes every key distinct.
    ramp = torch.arange(count, device=labels.device, dtype=torch.float64) * 2.0**-48
    key = noise.double() + ramp
    positive, used_positive = _smallest(key, labels == 1, num_positive)
    negative, used_negative = _smallest(key, labels == 0, num_samples)
    left = num_samples - used_positive.sum(dim=1, keepdim=True)
    used_negative &= torch.arange(negative.shape[1], device=labels.device) < left
    return torch.cat([positive, negative], dim=1), torch.cat([used_positive, used_negative], dim=1)


def _smallest(key: torch.Tensor, candidate: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, index = key.masked_fill(~candidate, torch.inf).topk(min(k, key.shape[1]), dim=1, largest=False)
    return index, values.isfinite()
