"""How far a result is from the expected one."""

import torch


def relative_error(actual, expected):
    """Relative L2 distance of two tensors or arrays, in float64."""
    actual, expected = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-30))
