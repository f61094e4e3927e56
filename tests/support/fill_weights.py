"""Weights and inputs of the recordings, under their former name."""

from mimdet.testing.weights import fill_module, gradient, image, noise, polygons, tensor_for

__all__ = ["fill_module", "gradient", "image", "noise", "polygons", "tensor_for"]
