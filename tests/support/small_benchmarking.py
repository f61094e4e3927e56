"""The small Benchmarking-ViT of the recordings, under its former name."""

from mimdet.testing.small_benchmarking import SMALL, loss, small_backbone, small_input

__all__ = ["SMALL", "loss", "small_backbone", "small_input"]
