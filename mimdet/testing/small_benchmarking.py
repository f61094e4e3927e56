"""A shrunken Benchmarking-ViT that keeps every part, its weights and its input."""

import torch

from ..modeling import BenchmarkingViTDet
from .small import normalized
from .weights import fill_module, gradient, image

SMALL = {"window_size": 4, "img_size": 128, "embed_dim": 64, "depth": 8, "num_heads": 2, "sincos_pos_embed": True}


def small_backbone(**changes):
    """The backbone of the recordings in ``recordings/benchmarking_small.npz``, in eval mode."""
    model = BenchmarkingViTDet(**{**SMALL, **changes})
    fill_module(model)
    return model.eval()


def small_input(count=2):
    """Normalized images (count, 3, img_size, img_size)."""
    side = SMALL["img_size"]
    return torch.stack(normalized([torch.from_numpy(image(11 + i, side, side)) for i in range(count)]))


def loss(features):
    """A number that all weights have a part in. In s3's pooling no two cells are so close that rounding matters."""
    return sum((f * torch.from_numpy(gradient(100 + i, f.shape))).sum() for i, f in enumerate(features.values()))
