"""GELU and its derivative at every number of a 16-bit dtype."""

import torch
import torch.nn.functional as F


def all_numbers(dtype):
    """(64, 1024): the finite numbers of a 16-bit dtype, and zeros."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = torch.where(numbers.isfinite(), numbers, torch.zeros_like(numbers))
    return numbers.view(64, 1024)


def check_everywhere(z, y, derivative, floor=2.0**-126):
    """Every number of y = GELU(z) and of its derivative: at most an ulp further off than twice plain PyTorch's error.

    Each number has its budget: an error of the far tail would be nothing beside the largest number.

    Args:
        z: as ``all_numbers`` returns it.
        y, derivative: like z.
        floor: allowed absolute error, a number or a tensor like z; by default where float32 becomes subnormal.
    """
    leaf = z.clone().requires_grad_()
    same = F.gelu(leaf)
    (same_derivative,) = torch.autograd.grad(same, leaf, torch.ones_like(same))
    z = z.double()
    cdf = 0.5 * torch.special.erfc(z * -(0.5**0.5))
    density = torch.exp(-0.5 * z * z) / (2 * torch.pi) ** 0.5
    checks = {"GELU": (y, same, z * cdf), "derivative": (derivative, same_derivative, cdf + z * density)}
    for name, (actual, reference, exact) in checks.items():
        assert actual.isfinite().all(), name
        limits = torch.finfo(actual.dtype)
        ulp = torch.exp2(exact.abs().clamp_min(limits.smallest_normal).log2().floor()) * limits.eps
        error, plain = ((t.detach().cpu().double() - exact).abs() for t in (actual, reference))
        excess = error - (2 * plain + ulp + floor)
        worst = excess.argmax()
        assert excess.max() <= 0, f"{name} of {z.flatten()[worst]} is off by {error.flatten()[worst]:.3g}"
