"""Tools for tests of this package, a port or a kernel: error budget, fixed random numbers, tiny detectors."""

from .budget import assert_within_budget, error_and_budget
from .configs import tiny_config, tiny_overrides
from .noise import fixed_noise

__all__ = ["assert_within_budget", "error_and_budget", "fixed_noise", "tiny_config", "tiny_overrides"]
