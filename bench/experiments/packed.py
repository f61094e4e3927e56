"""``mimdet bench packed``: a batch of images of different sizes, padded (canvas), packed, and one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...modeling import ImageList
from ...testing import fixed_noise
from .. import session, views, workload
from ..baselines import bottom_up
from ..equality import model_mismatch
from ..row import Results
from ..session import Candidate
from ..workload import Setting

LAYOUTS = ("canvas", "packed", "one by one")
_STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        sizes: height and width of each image of the batch, multiples of 32; instead of size and batch.
    """

    sizes: Sequence[tuple[int, int]]

    def keys(self, experiment: str, mode: str) -> dict[str, str | int | float]:
        """As ``Setting.keys``, with all sizes."""
        sizes = " ".join("{}x{}".format(*size) for size in self.sizes)
        return {"experiment": experiment, "size": sizes, "dtype": self.dtype, "ratio": self.ratio, "mode": mode}


def run(options: Options) -> Results:
    """Check packed against one by one, then measure all three, print and write the table.

    Raises:
        ValueError: fewer than two images.
    """
    if len(options.sizes) < 2:
        raise ValueError(f"a batch of different images needs two sizes or more, got {len(options.sizes)}")
    results = session.begin(options.device, [options.dtype])
    batch = _Batch(options)
    for mode in options.modes:
        batch.model.train(mode == "train")
        candidates = []
        for layout in LAYOUTS:
            keys = {**options.keys("packed", mode), "implementation": layout}
            error = batch.mismatch(mode) if layout == "packed" else None
            work = workload.backbone_step(batch.model, partial(batch.forward, layout), mode, options)
            values = {} if error else workload.memory_of(work, mode, options)
            values.pop("allocated_mib", None)
            candidates.append(Candidate(keys, work.step, error, values))
        rows = session.interleave(results, candidates, options.rounds, options.output)
        title = "backbone, " + views.title(rows, "mode", "size", "dtype", "ratio")
        views.console().print(views.terminal(title, columns(rows), rows))
    return results


class _Batch:
    """Random images, their sampling noise, and the backbone.

    Stochastic depth is off: the layouts would draw its random numbers in different orders.
    """

    def __init__(self, options: Options):
        self.options = options
        overrides = (*options.overrides, "model.backbone.bottom_up.encoder.dpr=0.0")
        self.model = bottom_up(workload.build_detector(options.config, overrides, 4, options.device))
        self.model.sample_ratio = self.model.inference_sample_ratio = options.ratio
        generator = torch.Generator().manual_seed(1)
        images = ImageList.from_tensors([torch.randn(3, *size, generator=generator) for size in options.sizes], 32)
        images.tensor = images.tensor.to(options.device).contiguous(memory_format=torch.channels_last)
        grid = images.tensor.shape[-2] // 16, images.tensor.shape[-1] // 16
        noise = torch.rand(len(images), *grid, generator=generator).to(options.device)
        self.together = images, noise.flatten(1)
        self.alone = []
        for image, numbers, (height, width) in zip(images.tensor, noise, images.image_sizes, strict=True):
            cropped = image[None, :, :height, :width].contiguous(memory_format=torch.channels_last)
            self.alone.append((cropped, numbers[: height // 16, : width // 16].reshape(1, -1)))

    def forward(self, layout: str) -> list[dict[str, torch.Tensor]]:
        """Features of the batch, or of each image."""
        self.model.batch_mode = "packed" if layout == "packed" else "canvas"
        batches = self.alone if layout == "one by one" else [self.together]
        return [self._features(*batch) for batch in batches]

    def _features(self, images: ImageList | torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        with fixed_noise(self.model, tokens=noise):
            return self.model(images)

    def mismatch(self, mode: str) -> str | None:
        """Why packed is not timed: features or gradients that differ from those of each image alone."""
        with torch.set_grad_enabled(mode == "train"), workload.exact_convolutions():
            actual, expected = (self._outputs(layout, mode) for layout in ("packed", "one by one"))
        difference = model_mismatch(actual, expected, self.options.dtype)
        return f"wrong: {difference}" if difference else None

    def _outputs(self, layout: str, mode: str) -> Mapping[str, torch.Tensor]:
        """Features of each image without its padding, and the gradient."""
        images = []
        with self.options.autocast():
            batches = self.forward(layout)
        for b, (height, width) in enumerate(self.options.sizes):
            features, row = (batches[0], b) if len(batches) == 1 else (batches[b], 0)
            images.append({n: features[n][row, :, : height // s, : width // s] for n, s in _STRIDES.items()})
        tensors = {f"{n} of image {b}": f.detach().float() for b, image in enumerate(images) for n, f in image.items()}
        if mode == "train":
            smooth = [feature for image in images for feature in workload.smooth_features(image)]
            torch.autograd.backward(smooth, workload.gradients_of(smooth))
            gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            tensors["gradient"] = torch.cat(gradients)
            workload.forget_gradients(self.model)
        return tensors


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """Time, memory, and the speed-up over the padded batch."""
    return [
        ("images, mode, ratio", lambda row: f"{row['size']}, {row['mode']}, {row['ratio']:g}", ""),
        ("batch", "implementation", ""),
        ("ms", "p50_ms", ".4g"),
        ("activations MiB", "activation_mib", ".0f"),
        ("peak MiB", "peak_mib", ".0f"),
        ("speed vs canvas", views.speedup_over("canvas", rows), ".2f"),
    ]


def draw(rows: Sequence[dict]):
    """Milliseconds of each layout, with its speed-up, a panel for each mode."""
    modes = views.grouped(rows, "mode")
    figure = views.figure(4.5 * len(modes), 3.2)
    speedup = views.speedup_over("canvas", rows)
    for axes, (mode, shown) in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes.items(), strict=True):
        heights = [row["p50_ms"] for row in shown]
        bars = axes.bar([row["implementation"] for row in shown], heights, color=views.BARS[: len(shown)])
        ratios = [speedup(row) for row in shown]
        axes.bar_label(bars, ["" if ratio is None else f"{ratio.median:.2f}x" for ratio in ratios], fontsize=8)
        axes.set_title(f"{mode}, ratio {shown[0]['ratio']:g}", fontsize=10)
        axes.set_ylabel("ms")
        axes.margins(y=0.12)
    figure.suptitle(f"backbone, images of {rows[0]['size']}, {rows[0]['dtype']}", fontsize=10)
    return figure
