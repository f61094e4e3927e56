"""Tools for tests of this package, a port or a kernel: cases of every operation, error budget, fixed random numbers,
recordings of the original, tiny detectors."""

from .budget import Measurement, assert_within_budget, error_and_budget, measure
from .configs import tiny_config, tiny_overrides
from .noise import fixed_noise
from .op_cases import Case, cases
from .recording import Recording, RecordingError

__all__ = [
    "Case",
    "Measurement",
    "Recording",
    "RecordingError",
    "assert_within_budget",
    "cases",
    "error_and_budget",
    "fixed_noise",
    "measure",
    "tiny_config",
    "tiny_overrides",
]
