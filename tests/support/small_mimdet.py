"""The small MIMDet of the recordings, under its former name."""

from mimdet.testing.small import SIZES, SMALL, make_images, normalized, small_config, small_model, target

__all__ = ["SIZES", "SMALL", "make_images", "normalized", "small_config", "small_model", "target"]
