"""The backbones as Detectron2 ``Backbone`` modules, for its FPN."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.utils.logger import log_first_n

from .. import modeling


class _InDetectron2:
    """Mixin: the interface of Detectron2's ``Backbone`` on a native backbone, a later base class."""

    size_divisibility = 0  # instances set it, which Detectron2's read-only property would forbid

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Padding of images, in Detectron2's format."""
        return {"size_divisibility": self.size_divisibility}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        shapes = super().output_shape().items()
        return {name: ShapeSpec(channels=shape.channels, stride=shape.stride) for name, shape in shapes}


class BenchmarkingViTDet(_InDetectron2, modeling.BenchmarkingViTDet, Backbone):
    """The native ``BenchmarkingViTDet``, its arguments and weights, as a Detectron2 ``Backbone``."""


class MIMDetBackbone(_InDetectron2, modeling.MIMDetBackbone, Backbone):
    """The native ``MIMDetBackbone``, its arguments and weights, as a Detectron2 ``Backbone``.

    In eval mode the keep ratio is ``inference_sample_ratio``, by default 1.0. The original uses ``sample_ratio`` in
    both modes.
    """

    def forward(self, images: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As the native forward; ``images`` is Detectron2's ``ImageList``.

        A plain (B, C, H, W) tensor counts as unpadded; the first one gives a warning.

        Raises:
            TypeError: another type.
        """
        if isinstance(images, torch.Tensor):
            log_first_n(logging.WARNING, _PLAIN_TENSOR, name=__name__)
        elif not (hasattr(images, "tensor") and hasattr(images, "image_sizes")):
            raise TypeError(f"MIMDetBackbone takes an ImageList, not {type(images).__name__}: {_ADVICE}")
        return super().forward(images, *args, **kwargs)


_ADVICE = "GeneralizedRCNNImageListForward passes it to the backbone, Detectron2's GeneralizedRCNN only images.tensor"
_PLAIN_TENSOR = (
    f"MIMDetBackbone got a plain tensor instead of an ImageList, so padding counts as image and is sampled ({_ADVICE})"
)
