"""``mimdet bench launches``: how many operations a training step dispatches, by component and kind.

Ours is counted with fake CUDA tensors: without a GPU, in seconds, at any size. A count is of operators that PyTorch's
dispatcher sees, below autograd; one may launch several kernels of the GPU, views launch none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.utils.flop_counter import flop_registry

from ...config import load
from ...engine.model import build_model
from ...engine.optim import build_optimizer
from .. import environment, views, workload
from ..fake_gpu import fake_gpu, to_fake_gpu, train_step
from ..operations import OTHER, UPDATE, Counter, moves_nothing, tensors_of
from ..row import Results
from ..session import DTYPES
from ..workload import Setting, check_choices
from .detectron2 import BACKBONE, batch_of_detectron2, original_config

MODELS = {"MIMDet": "ours", "original": "original-sdpa"}  # and their implementation in other experiments
COMPARED = "mimdet_b_mask_rcnn"  # the config of the original's detector
KINDS = ("view", "small", "fused", "gemm")
DIRECTIONS = ("forward", "backward", "update")
REST = "the rest"
# Component -> modules, by name in the detector; the longest name wins.
COMPONENTS = {
    **BACKBONE,
    "RPN": ("proposal_generator",),
    "box pooling and head": ("roi_heads.box_pooler", "roi_heads.box_head", "roi_heads.box_predictor"),
    "mask pooling and head": ("roi_heads.mask_pooler", "roi_heads.mask_head"),
    "ROI targets, losses": ("roi_heads",),
    "dense head": ("head",),
    REST: ("",),
}
_ORIGINAL_SIZE = (224, 320)  # it computes on the CPU


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to count.

    Attributes:
        original: checkout of the original MIMDet, which runs on today's libraries; None counts ours alone.
        dtype: fp32 or bf16.
    """

    original: Path | None = None
    part: str = "detector"


def run(options: Options) -> Results:
    """Count a training step, print the table and write the file.

    Raises:
        FileNotFoundError: ``options.original`` is not a checkout of the original.
        ImportError: Detectron2 is missing.
        ValueError: another dtype, or a config that the original does not have.
    """
    check_choices([options.dtype], ("fp32", "bf16"), "to count")
    results = Results(environment.command(), environment.describe(options.device), {})
    if options.original is not None:
        original = _original(options)
    results.rows = rows_of("MIMDet", count(options), options)
    if options.original is not None:
        smaller = replace(options, size=_ORIGINAL_SIZE)
        results.rows += rows_of("original", _count_original(original, smaller), smaller)
    results.write(options.output)
    show(results.rows)
    return results


class Launches(Counter):
    """Counts the operators on tensors of one device that run inside ``with``.

    Args:
        model, optimizer: of the step.
        device: "cuda", or "cpu" for the original; tensors of other devices do not count.

    Attributes:
        counts: (component, direction, operator) -> calls. All after the backward pass is the update.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: str = "cuda"):
        super().__init__(model, COMPONENTS, optimizer)
        self.device = device
        self.counts: dict[tuple[str, str, torch._ops.OpOverload], int] = defaultdict(int)
        self._seen_backward = False

    def _place(self) -> tuple[str, str]:
        component, direction = self._owner()
        self._seen_backward |= direction == "backward"
        if direction == "forward" and self._seen_backward:
            return UPDATE, UPDATE
        return (REST if component == OTHER else component), direction

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.namespace != "prim" and any(
            t.device.type == self.device for t in tensors_of((args, kwargs, result))
        ):
            self.counts[(*self._place(), function)] += 1
        return result


def kind_of(function: torch._ops.OpOverload) -> str:
    """One of ``KINDS``: a view aliases its input without writing, or is new memory that is not written; a gemm is a
    matrix product or a convolution, or its backward; fused are operators of ``mimdet``, PyTorch's attention and its
    fused optimizers; small are all others."""
    name = function.overloadpacket.__name__
    if moves_nothing(function):
        return "view"
    if function.namespace == "mimdet" or "dot_product_" in name or name.startswith("_fused_"):
        return "fused"
    return "gemm" if function.overloadpacket in flop_registry else "small"


def count(options: Options) -> Mapping[tuple, int]:
    """Operators of the second training step of a config's detector; see ``Launches.counts``."""
    with fake_step(options) as (step, model, optimizer):
        step()  # allocates the optimizer's state
        with Launches(model, optimizer) as launches:
            step()
    return launches.counts


@contextmanager
def fake_step(options: Setting) -> Iterator[tuple[Callable[[], object], nn.Module, torch.optim.Optimizer]]:
    """A training step of a config's detector on fake CUDA tensors, and its model and optimizer."""
    cfg = load(options.config, options.overrides)
    encoder = OmegaConf.select(cfg, "model.backbone.bottom_up.encoder") or {}
    for name, value in (("checkpointing", False), ("recompute", "none")):
        if encoder.get(name) == "auto":  # recompute nothing where the config leaves that to the machine's memory
            encoder[name] = value
    with torch.device("meta"):
        model = build_model(cfg, pretrained=False).train()
    images, targets = workload.random_batch(options.batch, options.size, model.num_classes, "cpu")
    if getattr(model.backbone.bottom_up, "batch_mode", None) == "packed":
        # Equal images are not packed.
        images[1:] = [image[:, : options.size[0] // 2] for image in images[1:]]
    every = [
        {"image": image, "image_id": i, "targets": target}
        for i, (image, target) in enumerate(zip(images, targets, strict=True))
    ]
    with fake_gpu():
        to_fake_gpu(model)
        optimizer = build_optimizer(cfg.optimizer, model)
        dtype = None if options.dtype == "fp32" else DTYPES[options.dtype]
        step = train_step(model, optimizer, cfg.train.get("clip_grad_norm"), dtype)
        yield (lambda: step(every)), model, optimizer


def _original(options: Options) -> nn.Module:
    """The original's detector with random weights."""
    if Path(options.config).stem != COMPARED:
        raise ValueError(f"--original: the original has no detector of config {options.config}; take {COMPARED}")
    cfg = original_config(options)
    from detectron2.config import instantiate  # isort: skip

    return instantiate(cfg.model).train()


def _count_original(model: nn.Module, options: Options) -> Mapping[tuple, int]:
    """Operators of a forward and a backward on the CPU, without checkpointing.

    There is no update: PyTorch's optimizers do another there.

    Tensors that it keeps on the host beside a GPU count too.
    """
    from detectron2.utils.events import EventStorage

    batch = workload.random_batch(options.batch, options.size, model.roi_heads.num_classes, "cpu")
    kept = workload.with_attribute(model, "checkpointing", False)
    with EventStorage(0), kept, Launches(model, workload.idle_optimizer(model), "cpu") as launches:
        with options.autocast():
            losses = model(batch_of_detectron2(*batch))
        sum(losses.values()).backward()
    return launches.counts


def rows_of(model: str, counts: Mapping[tuple, int], options: Options) -> list[dict]:
    """One row for each component, direction and kind, in the order of the model, which is one of ``MODELS``."""
    sums: dict[tuple[str, str, str], int] = defaultdict(int)
    for (component, direction, function), calls in counts.items():
        sums[component, direction, kind_of(function)] += calls
    keys = {**options.keys("launches", "train"), "config": options.config}
    order = [*COMPONENTS, UPDATE]
    return [
        {**keys, "model": model, "implementation": MODELS[model], "status": "ok",
         "component": component, "direction": direction, "kind": kind, "count": sums[component, direction, kind]}
        for component, direction, kind in sorted(
            sums, key=lambda p: (DIRECTIONS.index(p[1]), order.index(p[0]), KINDS.index(p[2]))
        )
    ]  # fmt: skip


def published(rows: Sequence[dict]) -> list[dict]:
    """A line for each model, direction and component, with a column for each kind, and one for their sum."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        for component in (row["component"], "all"):
            place = row["model"], row["direction"], component
            line = lines.setdefault(place, {**row, "component": component, **dict.fromkeys(KINDS, 0), "all": 0})
            line[row["kind"]] += row["count"]
            line["all"] += row["count"]
    order = [*COMPONENTS, UPDATE, "all"]
    places = sorted(lines, key=lambda p: ([*MODELS].index(p[0]), DIRECTIONS.index(p[1]), order.index(p[2])))
    return [lines[place] for place in places if place[1:] != (UPDATE, "all")]


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """For lines of ``published``."""
    return [
        ("model, direction, component", lambda line: f"{line['model']}, {_label(line)}", ""),
        *((kind, kind, "d") for kind in KINDS),
        ("all", "all", "d"),
    ]


def _label(line: dict) -> str:
    return ", ".join(dict.fromkeys((line["direction"], line["component"])))


def summary(rows: Sequence[dict]) -> str:
    """Operations of one model that launch kernels and multiply no matrices."""
    sums = {
        d: sum(r["count"] for r in rows if r["direction"] == d and r["kind"] in ("small", "fused")) for d in DIRECTIONS
    }
    return "small and fused: " + ", ".join(f"{sums[d]} {d}" for d in DIRECTIONS if sums[d])


def show(rows: Sequence[dict]) -> None:
    """Print the table of each model."""
    out = views.console()
    for model, of_model in views.grouped(rows, "model").items():
        title = views.title(of_model, "config", "size", "batch", "dtype")
        out.print(views.terminal(f"Operations of a training step, {title}", columns(of_model), published(of_model)))
        out.print(f"{model}, {summary(of_model)}")


def draw(rows: Sequence[dict]):
    """Operations of each component and direction by kind, a panel for each model."""
    models = views.grouped(rows, "model")
    panels = {name: [line for line in published(of) if line["component"] != "all"] for name, of in models.items()}
    heights = list(map(len, panels.values()))
    figure = views.figure(9, 1.2 + 0.26 * sum(heights))
    every = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)
    for (axes,), (model, lines) in zip(every, panels.items(), strict=True):
        kinds = {kind: ([line[kind] for line in lines], color) for kind, color in zip(KINDS, views.BARS, strict=False)}
        views.bars(axes, [_label(line) for line in lines], kinds, stacked=True)
        axes.set_title(f"{model}, {lines[0]['size']}; {summary(models[model])}", fontsize=9)
    every[0][0].legend(fontsize=8)
    every[-1][0].set_xlabel("operations")
    figure.suptitle(views.title(rows, "config", "batch", "dtype"), fontsize=10)
    return figure
