"""The ConvNet-ViT hybrid backbone (paper, Figure 1b)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .areas import PackedFeatures, ValidAreas
from .decoder import MIMDetDecoder
from .encoder import MIMDetEncoder
from .memory import AutoRecompute
from .pyramid import UpsampledTokens
from .sampling import SAMPLING, check_ratio
from .shapes import ImageList, ShapeSpec

BATCH_MODES = ("canvas", "packed")


class MIMDetBackbone(nn.Module):
    """Features c2 and c3 from the ConvStem or a ``pyramid``, c4 from the ViT, c5 pooled from c4.

    ``batch_mode`` says how images of different sizes share a batch:

    - "canvas", the padded batch of the original: padding is part of every image. Statistics, tokens and attention
      include it, so an image's features depend on the other images of the batch.
    - "packed": each image has the features that it has alone, at the cost of its own tokens. Statistics, position
      grid, sampling and attention cover each image alone; padding is zero in every output. FPN and heads of
      ``mimdet.detection`` keep it so.

    Without padding the two are the same.

    Args:
        encoder: ConvStem and ViT encoder.
        decoder: MAE decoder. None: the encoder sees every token, and its output is c4 (paper, Table 8).
        sample_ratio: keep ratio of the tokens in training, in (0, 1].
        size_divisibility: images are padded to multiples of it, pixels.
        _out_feature_channels: channels of c2..c5.
        _out_feature_strides: strides of c2..c5, pixels.
        inference_sample_ratio: keep ratio in eval mode, in (0, 1] (paper, Table 1: 1.0 is best).
        batch_mode: "canvas" or "packed".
        sampling: "random", or "grid" for every other token, as on a checkerboard (paper, Table 3).
        pyramid: makes c2 and c3 from the encoder's intermediate tokens (its ``taps``); None takes them from the stem.

    Raises:
        ValueError: a ratio outside (0, 1], an unknown mode, or parts that do not fit together.
    """

    out_features = ("c2", "c3", "c4", "c5")

    def __init__(
        self,
        encoder: MIMDetEncoder,
        decoder: MIMDetDecoder | None,
        sample_ratio: float = 0.5,
        size_divisibility: int = 32,
        _out_feature_channels: Sequence[int] = (192, 384, 512, 512),
        _out_feature_strides: Sequence[int] = (4, 8, 16, 32),
        inference_sample_ratio: float = 1.0,
        batch_mode: str = "canvas",
        sampling: str = "random",
        pyramid: UpsampledTokens | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.pyramid = pyramid
        if (0 if pyramid is None else 2) != len(encoder.taps):
            raise ValueError(f"backbone: a pyramid and two taps of the encoder need each other, got {encoder.taps}")
        self.sample_ratio = check_ratio(sample_ratio)
        self.inference_sample_ratio = check_ratio(inference_sample_ratio, "inference_sample_ratio")
        for name, value, choices in (("batch_mode", batch_mode, BATCH_MODES), ("sampling", sampling, SAMPLING)):
            if value not in choices:
                raise ValueError(f"{name}: {value!r} is unknown; choose from {', '.join(choices)}")
        for ratio in (self.sample_ratio, self.inference_sample_ratio):
            self._check_all_tokens(ratio)
        self.batch_mode = batch_mode
        self.sampling = sampling
        self._recomputation = AutoRecompute(*encoder.recomputation) if "auto" in encoder.recomputation else None
        self.size_divisibility = size_divisibility
        self._out_feature_channels = list(_out_feature_channels)
        self._out_feature_strides = list(_out_feature_strides)

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output."""
        shapes = zip(self.out_features, self._out_feature_channels, self._out_feature_strides, strict=True)
        return {name: ShapeSpec(channels=channels, stride=stride) for name, channels, stride in shapes}

    def forward(
        self,
        images: ImageList | torch.Tensor,
        sample_ratio: float | None = None,
    ) -> dict[str, torch.Tensor]:
        """Feature maps of a batch.

        Args:
            images: normalized images padded to ``size_divisibility``; a plain (B, C, H, W) tensor counts as
                unpadded.
            sample_ratio: keep ratio of this call. Default: ``sample_ratio`` in training, ``inference_sample_ratio`` in
                eval mode.

        Returns:
            c2, c3, c4, c5: (B, channels, H/stride, W/stride) each; ``PackedFeatures`` if ``batch_mode`` is "packed".

        Raises:
            ValueError: sides that are not multiples of ``size_divisibility``, a ratio outside (0, 1], or one that
                "grid" cannot take.
        """
        if isinstance(images, torch.Tensor):
            images = ImageList(images, [images.shape[-2:]] * images.shape[0])
        height, width = images.tensor.shape[-2:]
        if height % self.size_divisibility or width % self.size_divisibility:
            raise ValueError(
                f"backbone: images must be padded to multiples of {self.size_divisibility}, got {height}x{width}"
            )
        if sample_ratio is None:
            sample_ratio = self.sample_ratio if self.training else self.inference_sample_ratio
        self._check_all_tokens(sample_ratio)
        if self._recomputation is not None and self.training and torch.is_grad_enabled():
            self._make_room(images.tensor, sample_ratio)
        padded = any(size != (height, width) for size in images.image_sizes)
        packed = self.batch_mode == "packed" and padded
        maps = self._maps(images, sample_ratio, packed)
        if self.batch_mode == "canvas":
            return maps
        return PackedFeatures(maps, ValidAreas(images.image_sizes, (height, width), images.tensor.device))

    def _maps(self, images: ImageList, ratio: float, packed: bool) -> dict[str, torch.Tensor]:
        encoded = self.encoder(images, ratio, sampling=self.sampling, packed=packed)
        c4 = encoded.map(encoded.tokens) if self.decoder is None else self.decoder(encoded)
        c2, c3 = encoded.features[:2] if self.pyramid is None else self.pyramid(encoded)
        return {"c2": c2, "c3": c3, "c4": c4, "c5": F.max_pool2d(c4, 2)}

    def _make_room(self, images: torch.Tensor, ratio: float) -> None:
        """Decide from the batch what backward recomputes."""
        if torch.compiler.is_compiling() or type(images) is not torch.Tensor or images.is_meta:
            return  # torch.compile decides itself; fake tensors take no memory
        parts = [
            p for p in (self.encoder, self.decoder) if p is not None and p.recomputation == self.encoder.recomputation
        ]
        batch, channels, height, width = images.shape

        def run(side: int) -> object:
            fixed, self.encoder.noise.fixed = self.encoder.noise.fixed, []
            try:
                zeros = images.new_zeros(1, channels, side, side).contiguous(memory_format=torch.channels_last)
                image = ImageList(zeros, [(side, side)])
                return self._maps(image, ratio, packed=False)
            finally:
                self.encoder.noise.fixed = fixed

        self._recomputation.fit(parts, (batch, height, width), run, images.device)

    def _check_all_tokens(self, ratio: float) -> None:
        needs_all = self.decoder is None or self.pyramid is not None or self.encoder.window
        if needs_all and ratio != 1.0:
            raise ValueError(
                "backbone: without a decoder, with windows or a pyramid the encoder sees every token: sample_ratio and "
                f"inference_sample_ratio must be 1, got {ratio}"
            )
