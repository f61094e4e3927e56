"""Images of several sizes in one batch, tiny backbones for them, and the part of features that is of one image."""

import torch

from mimdet.config import instantiate
from mimdet.modeling import ImageList
from mimdet.testing import tiny_config
from mimdet.testing.small import make_images, normalized

STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


def cells(size, stride=16):
    return tuple(-(-side // stride) for side in size)


def batch(sizes, garbage=0.0):
    """Images of seeds that go with their sizes, and ``garbage`` around them."""
    by_size = {size: normalized(make_images([size], seed=10 * sum(size)))[0] for size in sizes}
    images = ImageList.from_tensors([by_size[size] for size in sizes], 32)
    for image, (height, width) in zip(images.tensor, images.image_sizes, strict=True):
        image[:, height:], image[:, :, width:] = garbage, garbage
    images.tensor = images.tensor.contiguous(memory_format=torch.channels_last)
    return images


def own(features, b, size):
    """The valid part of one image's features."""
    return {
        name: f[b, :, : cells(size, stride)[0], : cells(size, stride)[1]]
        for (name, stride), f in zip(STRIDES.items(), features.values(), strict=True)
    }


def tiny_backbone(name, *changes):
    """The backbone of a shipped config's counterpart, with random weights, so that every part has an effect."""
    torch.manual_seed(0)
    changes = [f"model.backbone.bottom_up.{change}" for change in changes]
    model = instantiate(tiny_config(name, *changes).model).backbone.bottom_up
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()
