"""``mimdet bench detectron2``: the whole detector beside the original MIMDet's own code on Detectron2."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import pad_sequence

from ...config import load
from ...detection import detector as native_detector
from ...detection import roi_heads, slots
from ...detection.rpn import RPN, Proposals
from ...engine.model import build_model
from ...engine.optim import build_optimizer
from ...testing import fixed_noise
from .. import session, views, workload
from ..baselines import bottom_up
from ..equality import BOX_TOLERANCE, detections_mismatch, model_mismatch
from ..limits import floor_seconds
from ..measure import Timings, rounded
from ..operations import OTHER, UPDATE, Counter, Dispatches
from ..row import Results, key
from ..session import Candidate
from ..workload import Setting, Workload, check_choices

ORIGINAL_CONFIG = "configs/mimdet/mimdet_vit_base_mask_rcnn_fpn_sr_0p5_800_1333_4xdec_coco_3x.py"
_CONFIG = "mimdet_b_mask_rcnn"
# Name -> (detector, whether it keeps the checkpointing of its config). Today's timm gives the original fused attention.
IMPLEMENTATIONS = {
    "ours": ("ours", True),
    "ours-fast-step": ("ours-fast-step", True),
    "ours-detectron2": ("ours-detectron2", True),
    "original-sdpa": ("original", True),
    "original-sdpa-no-checkpoint": ("original", False),
}
BASELINE = "original-sdpa"
# Component -> modules, by name in the detector; the longest name wins.
BACKBONE = {
    "ConvStem": ("backbone.bottom_up.encoder.patch_embed",),
    "encoder": ("backbone.bottom_up.encoder",),
    "decoder": ("backbone.bottom_up.decoder",),
    "backbone, the rest": ("backbone.bottom_up",),
    "pyramid": ("backbone",),
}
COMPONENTS = {
    **BACKBONE,
    "RPN head": ("proposal_generator.rpn_head",),
    "RPN proposals": (),
    "RPN targets, losses": ("proposal_generator",),
    "box pooling": ("roi_heads.box_pooler",),
    "box head": ("roi_heads.box_head", "roi_heads.box_predictor"),
    "mask pooling": ("roi_heads.mask_pooler",),
    "mask head": ("roi_heads.mask_head",),
    "ROI targets, losses, NMS": ("roi_heads",),
    "images, masks, the rest": ("",),
}
_METHODS = {"RPN proposals": "proposal_generator.predict_proposals"}
STEP = "whole step"
BACKWARD = "all components"
_PROPOSALS_THAT_DIFFER = 0.01
_GRADIENT_TOLERANCE = 1e-2  # rounding sends gradients through another side of max pooling and ReLU
_SCORE_SPREAD = 3.0  # standard deviation of class logits; a few of 1000 proposals then pass the threshold of 0.05


@dataclass(frozen=True, kw_only=True)
class Options(Setting):
    """What to measure.

    Attributes:
        original: checkout of the original MIMDet.
        overrides: of the configs of all implementations, in Detectron2's syntax.
        ratio: in inference too, as the original evaluates.
        implementations: each one of ``IMPLEMENTATIONS``.
        rounds: of the steps, and then of the components.
    """

    original: Path
    part: str = "detector"
    implementations: Sequence[str] = tuple(IMPLEMENTATIONS)
    rounds: int = 5


@dataclass(frozen=True)
class Detector:
    """A detector with its batch and optimizer.

    Attributes:
        model: with parameter names of the original.
        run: the forward: losses by name in training, detections in eval mode.
        optimizer: as its config has it, with learning rate zero.
    """

    model: nn.Module
    run: Callable[[], object]
    optimizer: torch.optim.Optimizer


def run(options: Options) -> Results:
    """Time a training step and inference, then their components; all detectors have one set of weights.

    Raises:
        ImportError: Detectron2 is missing.
        FileNotFoundError: ``options.original`` is not a checkout of the original.
        ValueError: an unknown implementation, or outputs that are not the original's.
    """
    check_choices(options.implementations, IMPLEMENTATIONS)
    detectors = build(options)
    check(detectors, options)
    results = session.begin(options.device, [options.dtype, "fp32"])
    for mode in options.modes:
        works, candidates = {}, []
        for name in options.implementations:
            detector, as_configured = IMPLEMENTATIONS[name]
            chosen = detectors[detector]
            forward = chosen.run if as_configured else partial(_without_checkpointing, chosen)
            work = workload.detector_step(chosen.model, forward, chosen.optimizer, mode, options)
            works[name] = work, chosen.optimizer
            keys = {**_keys(options, mode, chosen.model), "component": STEP, "implementation": name}
            values = workload.sizes_of(chosen.model) | workload.memory_of(work, mode, options)
            if mode == "train" or options.gpu:  # a CPU pastes masks in another way, box by box
                values |= dispatches(work, chosen.optimizer)
            candidates.append(Candidate(keys, work.step, values=values))
        steps = session.interleave(results, candidates, options.rounds, options.output)
        if options.rounds:
            rows = _components(works, mode, options, results)
            results.rows += rows
            results.write(options.output)
            views.console().print(views.terminal(f"{title(steps)}, by component", columns(rows), published(rows)))
        views.console().print(views.terminal(title(steps), _step_columns(steps), steps))
    return results


def dispatches(work: Workload, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Operators of a step without its update, and those that make the host wait for a GPU; see ``Dispatches``.

    On a CPU the native heads take the way that they take on a GPU: they count no boxes. Checks of the ground truth,
    which read tensors that are on the host, do not run.
    """
    with contextlib.ExitStack() as stack:
        for module in (slots, roi_heads):
            stack.enter_context(mock.patch.object(module, "counting_is_free", return_value=False))
        stack.enter_context(mock.patch.object(native_detector, "check_targets"))
        stack.enter_context(mock.patch.object(optimizer, "step"))
        with Dispatches() as counted:
            work.step()
    return {"count": counted.operations, "waits": counted.waits}


def make_importable(original: str | Path) -> None:
    """Put the original's modules on the path, and back into NumPy the name that they use and NumPy 1.24 removed."""
    if str(original) not in sys.path:
        sys.path.append(str(original))
    vars(np).setdefault("float", float)


def original_config(options: Setting) -> DictConfig:
    """The original's LazyConfig in the checkout ``options.original``, with the overrides; its modules importable.

    Raises:
        FileNotFoundError: it is no checkout of the original.
        ImportError: Detectron2 is not installed; says how to install it.
    """
    file = options.original / ORIGINAL_CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{options.original} is not a checkout of the original MIMDet: it has no {file.name}")
    from ...detectron2.require import require_detectron2

    require_detectron2()
    from detectron2.config import LazyConfig  # isort: skip

    make_importable(options.original)
    return LazyConfig.apply_overrides(LazyConfig.load(str(file)), list(options.overrides))


def build(options: Options) -> dict[str, Detector]:
    """The original, our backbone and then our whole step in Detectron2, and our detector, with equal weights."""
    configs = {"original": original_config(options)}
    from ...detectron2 import load_config, use_fast_step

    from detectron2.config import instantiate  # isort: skip

    configs |= {
        n: load_config(f"detectron2/{_CONFIG}", options.overrides) for n in ("ours-detectron2", "ours-fast-step")
    }
    use_fast_step(configs["ours-fast-step"].model)
    native = load(_CONFIG, options.overrides)
    torch.manual_seed(0)
    models = {name: instantiate(cfg.model) for name, cfg in configs.items()}
    models["ours"] = build_model(native, pretrained=False)
    images, targets = workload.random_batch(
        options.batch, options.size, native.model.roi_heads.num_classes, options.device
    )
    batch = batch_of_detectron2(images, targets)
    detectors = {}
    for name, model in models.items():
        model.to(options.device)
        bottom_up(model).sample_ratio = bottom_up(model).inference_sample_ratio = options.ratio
        if name in configs:
            configs[name].optimizer.params.model = model
            optimizer = instantiate(configs[name].optimizer)
            forward = partial(_run_detectron2, model, batch)
        else:
            optimizer = build_optimizer(native.optimizer, model)
            forward = partial(_run_ours, model, images, targets)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        detectors[name] = Detector(model, forward, optimizer)
    equalize(detectors)
    return detectors


def equalize(detectors: Mapping[str, Detector]) -> None:
    """Give all detectors the weights of "original".

    Random weights score all classes alike, and nothing is detected: those of the scores become larger. Statistics of
    norms become those of the batch and do not move, so that every step is the same.
    """
    original = detectors["original"]
    _set_momentum(original.model, 1.0)
    with torch.no_grad():
        original.model.train()
        original.run()
        seen = []
        layer = original.model.roi_heads.box_predictor.cls_score
        with layer.register_forward_hook(lambda m, a, out: seen.append(out.std())):
            original.model.eval()
            original.run()
        layer.weight.mul_(_SCORE_SPREAD / seen[0])
    for detector in detectors.values():
        detector.model.load_state_dict(original.model.state_dict())
        _set_momentum(detector.model, 0.0)


def _set_momentum(model: nn.Module, momentum: float) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


def _run_ours(model: nn.Module, images: list, targets: list) -> object:
    return model(images, targets) if model.training else model(images)


def _run_detectron2(model: nn.Module, batch: list) -> object:
    from detectron2.utils.events import EventStorage

    with EventStorage(0):
        return model(batch)


def batch_of_detectron2(images: Sequence[torch.Tensor], targets: Sequence[Mapping]) -> list[dict]:
    from detectron2.structures import Boxes, Instances, PolygonMasks

    batch = []
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[-2:]
        instances = Instances((height, width), gt_boxes=Boxes(target["boxes"]), gt_classes=target["labels"])
        instances.gt_masks = PolygonMasks([target["masks"][i] for i in range(len(target["masks"]))])
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def _plain(result: Mapping) -> Mapping[str, torch.Tensor]:
    """Boxes, scores, labels and masks of an image, also of Detectron2's result."""
    r = result.get("instances")
    if r is None:
        return result
    return {"boxes": r.pred_boxes.tensor, "scores": r.scores, "labels": r.pred_classes, "masks": r.pred_masks}


def _without_checkpointing(detector: Detector) -> object:
    with workload.with_attribute(detector.model, "checkpointing", False):
        return detector.run()


def check(detectors: Mapping[str, Detector], options: Options) -> None:
    """Raise ValueError unless all detectors detect and train as the original does, in float32.

    Equal are the backbone's features and 99 in 100 proposals: those with nearly equal scores may differ. With the
    original's proposals and candidates, losses, gradients and detections are equal too.
    """
    expected = Outputs.of(detectors["original"], options)
    if not any(len(image["boxes"]) for image in expected.detections):
        raise ValueError("the original detects nothing, so nothing was timed: take larger images")
    for name in dict.fromkeys(IMPLEMENTATIONS[i][0] for i in options.implementations):
        if name == "original":
            continue
        actual = Outputs.of(detectors[name], options, expected)
        difference = (
            model_mismatch(actual.tensors, expected.tensors, "fp32", _GRADIENT_TOLERANCE)
            or _proposals_mismatch(actual.proposals, expected.proposals)
            or detections_mismatch(actual.detections, expected.detections)
        )
        if difference:
            raise ValueError(f"{name} differs from the original, so nothing was timed: {difference}")


@dataclass
class Outputs:
    """What a detector computes from its batch.

    Attributes:
        tensors: features, losses and gradients, by name.
        proposals: (N, 4) boxes of each image: in eval mode, then in training.
        logits: (N,), of ``proposals``; Detectron2's only.
        detections: of each image.
    """

    tensors: dict[str, torch.Tensor]
    proposals: list[torch.Tensor]
    logits: list[torch.Tensor]
    detections: list[dict[str, torch.Tensor]]

    @classmethod
    def of(cls, detector: Detector, options: Options, shared: Outputs | None = None) -> Outputs:
        """With the same tokens for all detectors, and the first anchors and proposals as candidates.

        Args:
            shared: its proposals go to the ROI heads.
        """
        model, outputs, mode, anchors = detector.model, cls({}, [], [], []), "eval", 0
        generator, native = model.proposal_generator, _is_native(model)

        def keep_features(module, args, features):
            outputs.tensors |= {f"{mode} {name}": f.detach().float() for name, f in features.items()}

        def count_anchors(module, args, predicted):
            nonlocal anchors
            anchors = sum(logits.numel() for logits in predicted[0]) // options.batch

        def share_proposals(module, args, result):
            proposals, losses = result
            place = slice(len(outputs.proposals), len(outputs.proposals) + options.batch)
            if native:
                outputs.proposals += [boxes[valid] for boxes, valid in zip(*proposals, strict=True)]
            else:
                outputs.proposals += [each.proposal_boxes.tensor for each in proposals]
                outputs.logits += [each.objectness_logits for each in proposals]
            if shared is not None:
                proposals = _proposals(shared.proposals[place], None if native else shared.logits[place], options.size)
            return proposals, losses

        hooks = (bottom_up(model), keep_features), (generator.rpn_head, count_anchors), (generator, share_proposals)
        with contextlib.ExitStack() as stack:
            for module, hook in hooks:
                stack.enter_context(module.register_forward_hook(hook))
            for context in (equal_tokens(), _first_candidates(), workload.exact_convolutions()):
                stack.enter_context(context)
            stack.enter_context(workload.without_drop_path(model))
            with torch.no_grad():
                model.eval()
                outputs.detections = [_plain(result) for result in detector.run()]
            if native:
                slots = {"anchors": anchors, "proposals": generator.post_nms_topk[0] + workload.OBJECTS}
                equal = {name: torch.zeros(options.batch, count) for name, count in slots.items()}
                stack.enter_context(fixed_noise(model, **equal))
            mode = "train"
            model.train()
            losses = detector.run()
            sum(losses.values()).backward()
        outputs.tensors |= {name: loss.detach() for name, loss in losses.items()}
        gradients = defaultdict(list)
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                gradients[name.partition(".")[0]].append(parameter.grad.flatten())
        outputs.tensors |= {f"gradient of {part}": torch.cat(each) for part, each in gradients.items()}
        workload.forget_gradients(model)
        return outputs


def _is_native(model: nn.Module) -> bool:
    return isinstance(model.proposal_generator, RPN)


def _proposals(boxes: Sequence[torch.Tensor], logits: Sequence[torch.Tensor] | None, size: tuple[int, int]):
    """Of each image, as our ROI heads take them; with logits as Detectron2's do."""
    if logits is None:
        counts = torch.tensor([[len(b)] for b in boxes])
        slots = pad_sequence(boxes, batch_first=True)
        return Proposals(slots, torch.arange(slots.shape[1]) < counts)
    from detectron2.structures import Boxes, Instances

    pairs = zip(boxes, logits, strict=True)
    return [Instances(size, proposal_boxes=Boxes(b), objectness_logits=scores) for b, scores in pairs]


def equal_tokens() -> contextlib.AbstractContextManager:
    """``torch.rand`` gives equal numbers for equal shapes and leaves the generator as it is.

    At ratio 1 the original draws tokens and ours draws none.
    """
    real = torch.rand

    def rand(*size, device=None):
        shape = size if isinstance(size[0], int) else size[0]
        return real(shape, generator=torch.Generator().manual_seed(3)).to(device)

    return mock.patch.object(torch, "rand", rand)


def _first_candidates() -> contextlib.AbstractContextManager:
    """Detectron2 draws candidates with ``torch.randperm``; ours takes the first of equal numbers."""
    return mock.patch.object(torch, "randperm", lambda n, **options: torch.arange(n, **options))


def _proposals_mismatch(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    for boxes, theirs in zip(actual, expected, strict=True):
        if len(boxes) != len(theirs):
            return f"{len(boxes)} proposals, not {len(theirs)}"
        far = (torch.cdist(theirs, boxes, p=torch.inf).amin(1) > BOX_TOLERANCE).float().mean().item()
        if not far <= _PROPOSALS_THAT_DIFFER:
            return f"{far:.1%} of the proposals are more than {BOX_TOLERANCE} pixels away"
    return None


def _keys(options: Options, mode: str, model: nn.Module) -> dict[str, str | int | float]:
    depth = len(bottom_up(model).decoder.decoder_blocks)
    return {**options.keys("detectron2", mode), "ratio": options.ratio, "depth": depth}


def _components(
    works: Mapping[str, tuple[Workload, torch.optim.Optimizer]], mode: str, options: Options, results: Results
) -> list[dict]:
    """A row for each component, direction and implementation: its time in rounds of their own, its FLOPs, and the least
    time that the machine needs for its operations."""
    samples: dict[str, dict] = {name: defaultdict(list) for name in works}
    counters = {}
    with views.progress("components", options.rounds) as advance:
        for _ in range(options.rounds):
            for name, (work, optimizer) in works.items():
                parts = work.model, _modules(work.model), optimizer, _METHODS
                with Counter(*parts, operations=False) as clock:
                    work.step()
                with Counter(*parts) as counter:
                    work.step()
                for place, seconds in _seconds(clock, counter, mode).items():
                    samples[name][place].append(seconds)
                counters[name] = counter
            advance()
    rows = []
    for name, (work, _) in works.items():
        timings = Timings({place: s for place, s in samples[name].items() if len(s) == options.rounds})
        for component, direction in timings.samples:
            kinds = [w for (c, d, *_), w in counters[name].work.items() if (c, d) == (component, direction)]
            floor = sum(floor_seconds(results.limits, w.dtype, w.flops, w.bytes) for w in kinds)
            keys = {"component": component, "direction": direction, "implementation": name}
            row = {**_keys(options, mode, work.model), **keys, "status": "ok"}
            row |= timings.columns((component, direction))
            if kinds:
                row |= {"gflop": rounded(sum(w.flops for w in kinds) / 1e9), "floor_ms": rounded(1e3 * floor)}
            rows.append(row)
    return rows


def _seconds(clock: Counter, counter: Counter, mode: str) -> dict[tuple[str, str], float]:
    """(component, direction) -> wall clock in forward and of the whole backward, and in backward that of operations."""
    seconds = {place: s for place, s in clock.seconds.items() if place[1] == "forward" and place[0] != OTHER}
    for (component, direction, *_), work in counter.work.items():
        if direction == "backward" or component == OTHER:
            seconds[component, direction] = seconds.get((component, direction), 0.0) + work.seconds
    if mode == "train":
        recomputed = sum(s for (_, direction), s in clock.seconds.items() if direction == "backward")
        seconds[BACKWARD, "backward"] = clock.seconds[OTHER, "forward"] + recomputed
    return seconds


def _modules(model: nn.Module) -> dict[str, Sequence[str]]:
    """``COMPONENTS``; the forward of Detectron2's mask head has its loss and targets too, so there its layers count."""
    if _is_native(model):
        return COMPONENTS
    (head,) = COMPONENTS["mask head"]
    layers = tuple(f"{head}.{name}" for name, _ in model.get_submodule(head).named_children())
    rest = "ROI targets, losses, NMS"
    return {**COMPONENTS, "mask head": layers, rest: (*COMPONENTS[rest], head)}


def title(rows: Sequence[dict]) -> str:
    """Of the rows of one mode."""
    return views.title(rows, "part", "mode", "size", "batch", "dtype", "ratio")


def _step_columns(rows: Sequence[dict]) -> list[views.Column]:
    return [
        ("implementation", "implementation", ""),
        ("ms", "p50_ms", ".4g"),
        ("activations MiB", "activation_mib", ".0f"),
        ("peak MiB", "allocated_mib", ".0f"),
        ("operations", "count", "d"),
        ("waits", "waits", "d"),
        *((f"speed vs {name}", views.speedup_over(name, rows), ".2f") for name in (BASELINE, "ours")),
    ]


def published(rows: Sequence[dict]) -> list[dict]:
    """One row for each component and direction, in the order of the model, then the whole step."""
    order = [*COMPONENTS, OTHER, BACKWARD, UPDATE, STEP]
    first = {_place(row): row for row in reversed(rows)}
    return sorted(first.values(), key=lambda row: _order(row, order))


def columns(rows: Sequence[dict]) -> list[views.Column]:
    """For rows of ``published``: the time of each implementation, and our speed-up."""
    at = {(_place(row), row["implementation"]): row for row in rows}

    def milliseconds(name: str) -> Callable[[dict], float | None]:
        return lambda row: at.get((_place(row), name), {}).get("p50_ms")

    def ours_over(row: dict):
        ours, theirs = (at.get((_place(row), name)) for name in ("ours", BASELINE))
        return ours and views.speedup(ours, theirs)

    present = {row["implementation"] for row in rows}
    names = [name for name in IMPLEMENTATIONS if name in present]
    return [
        ("step, component", _label, ""),
        *((f"{name} ms", milliseconds(name), ".4g") for name in names),
        (f"ours vs {BASELINE}", ours_over, ".2f"),
    ]


def _place(row: dict) -> tuple:
    return key(row, "implementation")


def _order(row: dict, order: Sequence[str]) -> tuple:
    return row["mode"] != "train", order.index(row["component"]), row.get("direction") != "forward"


def _label(row: dict) -> str:
    return ", ".join(row[name] for name in ("mode", "component", "direction") if name in row)


def draw(rows: Sequence[dict]):
    """Milliseconds of each component, forward and backward, a bar for each implementation and a panel for each mode."""
    modes = views.grouped(rows, "mode")
    names = [name for name in IMPLEMENTATIONS if name in views.grouped(rows, "implementation")]
    places = {mode: published(of_mode) for mode, of_mode in modes.items()}
    figure = views.figure(10, 1.2 + 0.36 * sum(map(len, places.values())))
    panels = figure.subplots(len(modes), squeeze=False, height_ratios=list(map(len, places.values())))
    for (axes,), (mode, lines) in zip(panels, places.items(), strict=True):
        at = {(_place(row), row["implementation"]): row["p50_ms"] for row in modes[mode]}
        series = {name: ([at.get((_place(line), name)) for line in lines], views.COLORS[name]) for name in names}
        views.bars(axes, [_label(line) for line in lines], series)
        axes.set_xlabel("ms")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(views.heading(rows, "part", "size", "batch", "dtype", "ratio"))
    return figure
