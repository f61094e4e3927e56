"""``mimdet bench packed``: a batch of pictures of different sizes, on one canvas, packed, and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ..modeling import ImageList
from . import environment, report
from .backbone import TOLERANCE, distance, exact_convolutions
from .cases import DTYPES
from .limits import measure_limits
from .measure import Timings, measure, wall_timer
from .memory import peak_bytes, saved_bytes
from .models import bottom_up, build_detector
from .results import Results
from .workload import MODES, Setting, check_words

FORMS = ("canvas", "packed", "one by one")
_STRIDES = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        sizes: height and width of each picture of the batch, multiples of 32; takes the place of size and batch.
        ratio: keep ratio.
        modes: words of ``MODES``.
        rounds: see ``measure``.
        output: file of results.
    """

    output: Path
    sizes: Sequence[tuple[int, int]]
    ratio: float = 0.5
    modes: Sequence[str] = MODES
    rounds: int = 15


def run_packed(options: Options) -> Results:
    """Check packed against one by one, then measure all three, print and write the table.

    Raises:
        ValueError: a word that is not known, or fewer than two pictures.
    """
    check_words(options.modes, MODES)
    if len(options.sizes) < 2:
        raise ValueError(f"a batch of different pictures needs two sizes or more, got {len(options.sizes)}")
    limits = measure_limits(options.device, [DTYPES[options.dtype]])
    found = Results("packed", environment.command(), environment.describe(options.device), limits)
    batch = _Batch(options)
    out = report.console()
    for mode in options.modes:
        batch.model.train(mode == "train")
        fault = batch.fault(mode)
        steps = {form: partial(batch.step, form, mode) for form in FORMS if not (fault and form == "packed")}
        memory = {form: batch.memory(form, mode) for form in steps}
        done = list(found.rows)
        with report.progress() as bar:
            task = bar.add_task(mode, total=options.rounds)

            def keep(timings: Timings, mode=mode, fault=fault, memory=memory, done=done, bar=bar, task=task):
                made = [_row(form, mode, timings, fault, memory.get(form, {}), options) for form in FORMS]
                found.rows = [*done, *made]
                found.write(options.output)
                bar.advance(task)

            measure(steps, options.rounds, timer=wall_timer, warmup=1, least=0.0, on_round=keep)
        out.print(_table(found.rows[len(done) :]))
    return found


class _Batch:
    """Pictures of noise, the numbers that choose their tokens, and the backbone that they go through.

    Without stochastic depth: the forms would draw its numbers in different orders.
    """

    def __init__(self, options: Options):
        self.options = options
        overrides = (*options.overrides, "model.backbone.bottom_up.encoder.dpr=0.0")
        self.model = bottom_up(build_detector(options.config, overrides, 4, options.device))
        self.model.sample_ratio = self.model.inference_sample_ratio = options.ratio
        generator = torch.Generator().manual_seed(1)
        images = ImageList.from_tensors([torch.randn(3, *size, generator=generator) for size in options.sizes], 32)
        images.tensor = images.tensor.to(options.device).contiguous(memory_format=torch.channels_last)
        grid = images.tensor.shape[-2] // 16, images.tensor.shape[-1] // 16
        noise = torch.rand(len(images), *grid, generator=generator).to(options.device)
        self.whole = images, noise.flatten(1)
        self.alone = []
        for image, numbers, (height, width) in zip(images.tensor, noise, images.image_sizes, strict=True):
            cut = image[None, :, :height, :width].contiguous(memory_format=torch.channels_last)
            self.alone.append((cut, numbers[: height // 16, : width // 16].reshape(1, -1)))

    def forward(self, form: str) -> list[dict[str, torch.Tensor]]:
        """Features of the batch, or of each picture."""
        self.model.batch_mode = "packed" if form == "packed" else "canvas"
        with self.options.autocast():
            return [self.model(*given) for given in (self.alone if form == "one by one" else [self.whole])]

    def step(self, form: str, mode: str) -> None:
        """What is timed."""
        if mode == "inference":
            with torch.inference_mode():
                self.forward(form)
            return
        features = [feature for made in self.forward(form) for feature in made.values()]
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
        self._forget()

    def memory(self, form: str, mode: str) -> dict[str, float | None]:
        """MiB at the step's peak, and kept for backward."""
        self.step(form, mode)
        peak = peak_bytes(partial(self.step, form, mode), self.options.device)
        saved = saved_bytes(partial(self.forward, form), self.model.parameters()) if mode == "train" else None
        sizes = {"peak_mib": peak, "saved_mib": saved}
        return {name: None if size is None else report.rounded(size / 2**20) for name, size in sizes.items()}

    def fault(self, mode: str) -> str | None:
        """Why packed must not be timed: features or gradients that are not those of the pictures alone."""
        with torch.set_grad_enabled(mode == "train"), exact_convolutions():
            got, want = (self._outcome(form, mode) for form in ("packed", "one by one"))
        for key, value in want.items():
            off, allowed = distance(got[key], value), TOLERANCE[self.options.dtype]["gradient" in key]
            if not off <= allowed:
                return f"wrong: {key} is {off:.2g} off, allowed {allowed:.2g}"
        return None

    def _outcome(self, form: str, mode: str) -> dict[str, torch.Tensor]:
        """Features of each picture without its padding, and the gradient."""
        made, own = self.forward(form), {}
        for b, (height, width) in enumerate(self.options.sizes):
            features, row = (made[0], b) if len(made) == 1 else (made[b], 0)
            for name, stride in _STRIDES.items():
                own[f"{name} of picture {b}"] = features[name][row, :, : height // stride, : width // stride]
        found = {key: value.detach().float() for key, value in own.items()}
        if mode == "train":
            # Not through c5: its pooling hands a gradient to the larger of two cells that may differ by rounding alone.
            smooth = [value for key, value in own.items() if not key.startswith("c5")]
            draw = torch.Generator().manual_seed(2)
            torch.autograd.backward(smooth, [torch.randn(f.shape, generator=draw).to(f) for f in smooth])
            given = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
            found["gradient"] = torch.cat(given)
            self._forget()
        return found

    def _forget(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None


def _row(form: str, mode: str, timings: Timings, fault: str | None, memory: dict, options: Options) -> dict:
    timed = form in timings.samples
    row = {
        "mode": mode,
        "sizes": " ".join("{}x{}".format(*size) for size in options.sizes),
        "dtype": options.dtype,
        "ratio": options.ratio,
        "form": form,
        "status": "ok" if timed else fault,
        **report.timed_columns(timings, form),
        "peak_mib": memory.get("peak_mib"),
        "saved_mib": memory.get("saved_mib"),
    }
    compared = timed and form != "canvas"
    return row | report.ratio_columns("vs_canvas", timings.speedup(form, "canvas") if compared else None)


def _table(rows: Sequence[dict]):
    first = rows[0]
    title = f"backbone, {first['mode']}, {first['sizes']}, {first['dtype']}, ratio {first['ratio']:g}"
    title += f"; A/A {report.ratio(first, 'control')}"
    body = []
    for row in rows:
        figures = [report.number(row[k], ".4g") for k in ("p50_ms", "peak_mib", "saved_mib")]
        figures = [*figures, report.ratio(row, "vs_canvas")] if row["status"] == "ok" else [row["status"], *"---"]
        body.append((row["form"], *figures))
    return report.table(title, ("form", "ms", "peak MiB", "saved MiB", "speed vs canvas"), body)
