"""Recordings that are in the package, and those that only tests read."""

from support.paths import RECORDINGS

from mimdet.testing.recording import FOLDER, Recording, take

__all__ = ["Golden", "take"]


class Golden(Recording):
    """A recording with limits for tests."""

    def __init__(self, name):
        super().__init__(name, FOLDER if (FOLDER / f"{name}.npz").exists() else RECORDINGS)

    def check(self, key, array, rel_l2):
        """Raise AssertionError where an array is further from the recording than ``rel_l2``."""
        error = self.error(key, array)
        assert error <= rel_l2, (key, error, rel_l2)
