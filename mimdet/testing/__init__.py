"""For tests of this package, of a port of it, or of a kernel: fixed random numbers and tiny detectors."""

from .configs import tiny_config, tiny_overrides
from .noise import fixed_noise

__all__ = ["fixed_noise", "tiny_config", "tiny_overrides"]
