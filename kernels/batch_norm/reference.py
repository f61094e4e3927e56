"""The steps of batch norm in plain PyTorch: what every implementation is measured against.

Arguments and results are those of ``ops``. Statistics are float32, of float64 maps float64.
"""

from __future__ import annotations

import torch

from ..tensors import valid_mask, zero_padding


def moments(x: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
    """(2 * C + 1,): mean of each channel, sum of its squared deviations, number of values in it."""
    values = _by_channel(_wide(x))
    if sizes is None:
        count = values.new_full((1,), values.shape[1])
    else:
        inside = _by_channel(_valid(x, sizes))
        values, count = values.where(inside, 0), inside.sum().to(values.dtype).view(1)
    n = count.clamp(min=1)
    mean = values.sum(1) / n
    centered = values - mean[:, None]
    if sizes is not None:
        centered = centered.where(inside, 0)
    # What rounding left in the mean corrects both moments.
    rest = centered.sum(1) / n
    return torch.cat([mean + rest, centered.square().sum(1) - n * rest.square(), count])


def statistics(parts: torch.Tensor, eps: float, unbiased: bool) -> torch.Tensor:
    """(3 * C + 1,): mean, rstd, variance to keep and 1 / total weight (0 without any), from moments of processes.

    Args:
        parts: (P, 2 * C + 1) ``moments``, whose count is a weight, and whose sums were weighted alike.
        eps: added to the variance.
        unbiased: the variance to keep is that of a sample whose size is the weight.
    """
    channels = parts.shape[1] // 2
    wide = parts if len(parts) == 1 else parts.double()
    means, m2s, weights = wide.split([channels, channels, 1], dim=1)
    total = weights.sum()
    inverse = (1 / total).where(total > 0, 0)
    mean = (weights * means).sum(0) * inverse
    m2 = (m2s + weights * (means - mean).square()).sum(0)
    variance = m2 * inverse
    kept = m2 / (total - 1).clamp(min=1) if unbiased else variance
    return torch.cat([mean, (variance + eps).rsqrt(), kept, inverse.view(1)]).to(parts.dtype)


def forward(x, weight, bias, mean, rstd, sizes, relu: bool) -> torch.Tensor:
    """``(x - mean) * rstd * weight + bias`` in x's dtype, after ReLU if asked; zero in cells that are not valid."""
    _, y = _normalized(x, weight, bias, mean, rstd)
    y = (y.relu() if relu else y).to(x.dtype)
    return y if sizes is None else zero_padding(y, sizes)


def sums(dy, x, weight, bias, mean, rstd, sizes, relu: bool) -> torch.Tensor:
    """(2, C): sums of dz and of dz * x_hat over valid cells; dz is dy behind the ReLU."""
    x_hat, dz = _before_relu(dy, x, weight, bias, mean, rstd, sizes, relu)
    return torch.stack([_by_channel(dz).sum(1), _by_channel(dz * x_hat).sum(1)])


def backward(dy, x, weight, bias, mean, rstd, means, sizes, relu: bool) -> torch.Tensor:
    """``weight * rstd * (dz - means[0] - x_hat * means[1])`` in x's dtype; zero in cells that are not valid."""
    x_hat, dz = _before_relu(dy, x, weight, bias, mean, rstd, sizes, relu)
    dx = _along(weight * rstd) * (dz - _along(means[0]) - x_hat * _along(means[1]))
    dx = dx.to(x.dtype)
    return dx if sizes is None else zero_padding(dx, sizes)


def _before_relu(dy, x, weight, bias, mean, rstd, sizes, relu):
    x_hat, z = _normalized(x, weight, bias, mean, rstd)
    dz = _wide(dy)
    if relu:
        dz = dz.masked_fill(z <= 0, 0)
    if sizes is not None:
        # Selected, not multiplied: 0 * NaN is NaN.
        inside = _valid(x, sizes)
        x_hat, dz = x_hat.where(inside, 0), dz.where(inside, 0)
    return x_hat, dz


def _normalized(x, weight, bias, mean, rstd):
    x_centered = _wide(x) - _along(mean)
    return x_centered * _along(rstd), x_centered * _along(weight * rstd) + _along(bias)


def _valid(x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) bool"""
    return valid_mask(sizes, x.shape[2:])[:, None]


def _along(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.view(-1, 1, 1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_channel(x: torch.Tensor) -> torch.Tensor:
    """(C, N * H * W), dense: PyTorch adds up rows of it in a tree, whatever the memory format of x."""
    return x.transpose(0, 1).flatten(1).contiguous()
