"""Images of several sizes in one batch, and how far features are from those of each image alone."""

import torch
from support.small_mimdet import make_images, normalized

from mimdet.modeling import ImageList

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
