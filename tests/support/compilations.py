"""Which kernels Triton would compile, and the sizes of images that training sees."""

import contextlib
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
from support.aot import target

from mimdet.bench.fake_gpu import FakeFabric, backward, supposed_gpu
from mimdet.config import instantiate
from mimdet.data import transforms

# No test compiles for it, so that Triton asks its hook about every kernel.
CAPABILITY = 87
# (height, width) of images of COCO, and how many of a hundred have them.
COCO_SIZES = {
    (480, 640): 31, (640, 480): 11, (427, 640): 17, (640, 427): 6, (426, 640): 9, (425, 640): 5, (640, 426): 3,
    (375, 500): 4, (333, 500): 2, (500, 375): 2, (640, 640): 2, (428, 640): 3, (360, 640): 2, (612, 612): 1,
    (512, 640): 1, (383, 640): 1,
}  # fmt: skip


class Fabric(FakeFabric):
    """Of one process, in bfloat16."""

    local_rank = 0

    @staticmethod
    def autocast():
        return torch.autocast("cuda", torch.bfloat16)


@contextlib.contextmanager
def compilations():
    """Inside, there seems to be a GPU, and Triton compiles nothing; yields the set of (kernel, key) that it would
    compile."""
    from triton import knobs

    keys = set()

    def hook(*, fn, compile, **_):
        keys.add((fn.name, compile["key"]))
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    # Autograd's engine needs a GPU.
    engine, torch.Tensor.backward = torch.Tensor.backward, lambda loss: backward(loss)
    try:
        with target(CAPABILITY), supposed_gpu():
            yield keys
    finally:
        knobs.runtime.jit_cache_hook, torch.Tensor.backward = before, engine


def image_sizes(cfg, steps, seed=0):
    """(height, width) of ``steps`` images after the augmentations of a config, which see sizes alone."""

    def image(height, width):
        return SimpleNamespace(height=height, width=width, size=(width, height))

    functions = SimpleNamespace(
        InterpolationMode=transforms.F.InterpolationMode,
        resize=lambda _, size, interpolation: image(*size),
        crop=lambda _, y, x, height, width: image(height, width),
        horizontal_flip=lambda image: image,
    )
    rng = np.random.default_rng(seed)
    augment = transforms.AugmentationList(instantiate(cfg.dataloader.train.mapper.augmentations))
    probabilities = np.array(list(COCO_SIZES.values())) / sum(COCO_SIZES.values())
    chosen = rng.choice(len(COCO_SIZES), steps, p=probabilities)
    replaced, transforms.F = transforms.F, functions
    try:
        images = [augment(image(*list(COCO_SIZES)[i]), None, rng)[0] for i in chosen]
    finally:
        transforms.F = replaced
    return [(image.height, image.width) for image in images]


def canvases(sizes, multiple=32):
    """Padded sizes, with how many images have them."""
    return Counter(tuple(math.ceil(side / multiple) * multiple for side in size) for size in sizes)


def varied(canvases):
    """The canvases whose area is smallest, largest, and a multiple of the lowest and the highest power of two."""

    def power(canvas):
        return math.prod(canvas) & -math.prod(canvas)

    return sorted({choose(sorted(canvases), key=key) for key in (power, math.prod) for choose in (max, min)})
