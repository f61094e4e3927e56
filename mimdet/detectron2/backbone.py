"""The backbones as Detectron2's FPN takes them."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.utils.logger import log_first_n

from .. import modeling


class _InDetectron2:
    """What Detectron2 asks of a backbone, answered by a native one that comes later among the bases."""

    size_divisibility = 0  # each instance has its own; the base class's cannot be set

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What images must be padded to, in Detectron2's words."""
        return {"size_divisibility": self.size_divisibility}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        shapes = super().output_shape().items()
        return {name: ShapeSpec(channels=shape.channels, stride=shape.stride) for name, shape in shapes}


class BenchmarkingViTDet(_InDetectron2, modeling.BenchmarkingViTDet, Backbone):
    """The native ``BenchmarkingViTDet``, its arguments and weights, as a Detectron2 ``Backbone``."""


class MIMDetBackbone(_InDetectron2, modeling.MIMDetBackbone, Backbone):
    """The native ``MIMDetBackbone``, its arguments and weights, as a Detectron2 ``Backbone``.

    In eval mode the keep ratio is ``inference_sample_ratio``, 1.0 unless told otherwise; the original's was
    ``sample_ratio`` in both modes.
    """

    def forward(self, images: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """As the native forward; ``images`` is Detectron2's ``ImageList``.

        A plain (B, C, H, W) tensor counts as unpadded, which the log says once.

        Raises:
            TypeError: neither of the two.
        """
        if isinstance(images, torch.Tensor):
            log_first_n(logging.WARNING, _PLAIN_TENSOR, name=__name__)
        elif not (hasattr(images, "tensor") and hasattr(images, "image_sizes")):
            raise TypeError(f"MIMDetBackbone takes an ImageList, not {type(images).__name__}: {_GIVE}")
        return super().forward(images, *args, **kwargs)


_GIVE = "GeneralizedRCNNImageListForward hands it on, Detectron2's GeneralizedRCNN only images.tensor"
_PLAIN_TENSOR = (
    f"MIMDetBackbone got a plain tensor instead of an ImageList, so padding counts as image and is sampled ({_GIVE})"
)
