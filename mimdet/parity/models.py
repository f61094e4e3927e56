"""Parts of the model against the recordings, Detectron2 and the original's checkout.

The recordings are of the model of ``mimdet.testing.small`` with the weights of ``mimdet.testing.weights``, images
``image(11, 224, 320)`` and ``image(12, 150, 300)``, ground truth ``polygons(21, ...)`` and ``polygons(22, ...)``, token
noise ``noise(7, ...)``. Wherever candidates are drawn at random, the first ones in index order were taken.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn

from ..bench.workload import exact_convolutions
from ..config import instantiate
from ..kernels import use
from ..modeling import ImageList
from ..testing import Recording, fixed_noise, small, small_benchmarking
from ..testing.budget import Measurement
from ..testing.op_cases import DTYPES
from ..testing.recording import take
from ..testing.weights import fill_module, gradient, noise

COUNTS = (3, 5)
RATIOS = (0.25, 0.5, 0.75, 1.0)
# Relative L2 distances that float32 allows: a GPU adds up in another order than the recordings' CPU.
FEATURES, GRADIENTS = {"cpu": 3e-6, "cuda": 1e-5}, {"cpu": 2e-5, "cuda": 1e-4}
# A ReLU whose input is near 0 may switch by rounding, hence the last.
LOSSES, STATISTICS, GRADIENTS_OF_LOSSES = 1e-5, 5e-5, 2e-2
MAPS, BOXES, RESIZED_BOXES, SCORES, MASKS = 1e-5, 5e-3, 1e-2, 1e-4, 1e-3
_SMOOTH = ("c2", "c3", "c4")  # c5 has max pooling
PIXELS = 10  # of one mask that may differ
_EPS = torch.finfo(torch.float32).eps


@cache
def recorded(name: str = "original_small") -> Recording:
    """A recording, read once."""
    return Recording(name)


@contextlib.contextmanager
def exactly(case) -> Iterator[None]:
    """The case's implementation, without TF32."""
    with use(case.implementation), exact_convolutions():
        yield


def near(name: str, error: float, budget: float, reference: float | None = None, eps: float = _EPS) -> Measurement:
    """A relative distance."""
    return Measurement(name, float(error), budget, reference or 0.0, eps)


@cache
def _model(device: str) -> nn.Module:
    return small.small_model().to(device)


def model_of(case) -> nn.Module:
    """The small model with the recordings' weights and statistics, in eval mode; built once for a device."""
    model = _model(case.device)
    fill_module(model)
    model.zero_grad()
    return model.eval()


def backbone_input(device: str = "cpu") -> ImageList:
    images = ImageList.from_tensors(small.normalized(small.make_images(seed=11)), 32)
    return ImageList(images.tensor.to(device), images.image_sizes)


def recorded_noise(model: nn.Module, device: str = "cpu"):
    """The recordings' tokens; anchors and proposals are chosen in the order of their index."""
    height, width = small.SIZES[0]
    anchors = 3 * sum(math.ceil(height / stride) * math.ceil(width / stride) for stride in (4, 8, 16, 32, 64))
    proposals = model.proposal_generator.post_nms_topk[0] + max(COUNTS)
    in_order = [(torch.arange(count) / count).expand(2, -1).to(device) for count in (anchors, proposals)]
    return fixed_noise(model, torch.from_numpy(noise(7, 2, 280)).to(device), *in_order)


def targets() -> list[dict]:
    """Ground truth of the recordings."""
    pairs = zip(small.SIZES, COUNTS, strict=True)
    return [small.target(21 + i, size, count) for i, (size, count) in enumerate(pairs)]


def backbone(case) -> list[Measurement]:
    """Features of one keep ratio; gradients of float32 in the same implementation, and of float64."""
    model, ratio = model_of(case), float(case.size.removeprefix("ratio"))
    if case.direction == "backward":
        return _backbone_gradients(case, model)
    prefix = f"{'stable_' if ratio == 0.75 else ''}r{ratio}_"  # ties among padding tokens matter there
    with exactly(case):
        errors = _feature_errors(case, model, ratio, prefix)
    if case.dtype == "fp32":
        return [
            near(name, error, FEATURES[case.device], recorded().floor(prefix + name)) for name, error in errors.items()
        ]
    with use("eager"), exact_convolutions():
        reference = _feature_errors(case, model, ratio, prefix)
    eps = torch.finfo(DTYPES[case.dtype]).eps
    return [near(k, error, 2 * reference[k] + eps, reference[k], eps) for k, error in errors.items()]


def _feature_errors(case, model, ratio: float, prefix: str) -> dict[str, float]:
    autocast = torch.autocast(case.device, DTYPES[case.dtype], enabled=case.dtype != "fp32")
    with torch.no_grad(), recorded_noise(model, case.device), autocast:
        features = model.backbone.bottom_up(backbone_input(case.device), sample_ratio=ratio)
    return {name: recorded().error(prefix + name, f.float().cpu().numpy()) for name, f in features.items()}


def _gradients(model, device: str, dtype: torch.dtype, names) -> dict[str, torch.Tensor]:
    bottom_up, images = model.backbone.bottom_up, backbone_input(device)
    bottom_up.to(dtype).zero_grad()
    with recorded_noise(model, device):
        features = bottom_up(ImageList(images.tensor.to(dtype), images.image_sizes), sample_ratio=0.5)
    upstream = {n: torch.from_numpy(gradient(100 + i, f.shape)).to(f) for i, (n, f) in enumerate(features.items())}
    sum((features[n] * upstream[n]).sum() for n in names).backward()
    return {n: p.grad.double().cpu() for n, p in bottom_up.named_parameters() if p.requires_grad}


@cache
def _exact_gradients(device: str) -> list[dict[str, torch.Tensor]]:
    """In float64 by plain PyTorch: without c5, and of all features."""
    model = small.small_model().to(device).eval()
    with use("eager"):
        return [_gradients(model, device, torch.float64, names) for names in (_SMOOTH, (*_SMOOTH, "c5"))]


def _backbone_gradients(case, model) -> list[Measurement]:
    """Float64 in plain PyTorch equals the recording; float32 equals float64 without c5, in whose max pooling rounding
    may choose the other of two nearly equal cells."""
    with exactly(case):
        actual = _gradients(model, case.device, torch.float32, _SMOOTH)
    exact, whole = _exact_gradients(case.device)
    results = []
    for name, value in whole.items():
        key = f"grad.{name}"
        results.append(near(key, recorded().error(key, value.numpy()), GRADIENTS["cpu"], recorded().floor(key)))
        error = (actual[name] - exact[name]).norm() / exact[name].norm().clamp(min=1e-30)
        results.append(near(f"{key} in float32", error, GRADIENTS[case.device]))
    return results


def losses(case) -> list[Measurement]:
    """Losses of a training step; backward also its gradients and statistics of norms."""
    model = model_of(case).train()
    with exactly(case), recorded_noise(model, case.device):
        values = model(_images(case), _to(case.device, ground_truth(case.size)))
        if case.direction == "backward":
            sum(values.values()).backward()
    prefix = f"train_{case.size}"
    results = compare_losses(prefix, values)
    if case.direction == "forward":
        return results
    for key in recorded().keys(f"{prefix}."):
        if ".grad." in key:
            value = recorded().part(key, model.get_parameter(key.split(".grad.")[1]).grad.cpu().numpy())
            expected = recorded().expected(key)
            budget = GRADIENTS_OF_LOSSES * np.linalg.norm(expected) + 1e-6
            error, ulp = np.linalg.norm(value - expected), _EPS * np.linalg.norm(expected)
            results.append(Measurement(key, float(error), float(budget), 0.0, float(ulp)))
        elif ".bn." in key:
            # PyTorch's channels_last batch norm sums naively on a CPU, worst on a single thread.
            value = model.get_buffer(key.split(".bn.")[1]).cpu().numpy()
            results.append(near(key, recorded().error(key, value), STATISTICS, recorded().floor(key)))
    return results


def compare_losses(prefix: str, values: Mapping[str, torch.Tensor]) -> list[Measurement]:
    """Losses by name, beside the recorded ones."""
    results = []
    for name, loss in values.items():
        expected = recorded().expected(f"{prefix}.{name}").item()
        budget, ulp = LOSSES * abs(expected) + 1e-9, _EPS * abs(expected)
        results.append(Measurement(name, abs(loss.item() - expected), budget, 0.0, ulp))
    return results


def ground_truth(kind: str) -> list[dict]:
    """Polygons, bitmasks, one instance of two parts, or no instances in one image or in all."""
    truth = targets()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": []}
    if kind == "bitmasks":
        pairs = zip(truth, small.SIZES, strict=True)
        return [{**t, "masks": _bitmaps(t["masks"], size)} for t, size in pairs]
    if kind == "one_empty":
        return [truth[0], empty]
    if kind == "all_empty":
        return [empty, empty]
    if kind == "two_parts":
        first, second, third = (truth[0]["masks"][i] for i in range(3))
        box = torch.cat([truth[0]["boxes"][:2, :2].amin(0), truth[0]["boxes"][:2, 2:].amax(0)])
        truth[0] = {
            "boxes": torch.stack([box, truth[0]["boxes"][2]]),
            "labels": truth[0]["labels"][[0, 2]],
            "masks": [[*first, *second], third],
        }
    return truth


def _bitmaps(polygons, size) -> torch.Tensor:
    from pycocotools import mask as coco

    rows = [coco.decode(coco.merge(coco.frPyObjects([q.tolist() for q in p], *size))) for p in polygons]
    return torch.from_numpy(np.stack(rows)).bool()


def detections(case) -> list[Measurement]:
    """Proposals and detections of one keep ratio, or detections at another image size."""
    model = model_of(case)
    word, _, size = case.size.partition(":")
    ratio = 0.5 if size else float(word.removeprefix("ratio"))
    model.backbone.bottom_up.inference_sample_ratio = ratio
    if size:
        return _resized(case, model, int(word.removeprefix("image")), tuple(map(int, size.split("x"))))
    seen = {}
    hooks = [
        model.backbone.register_forward_hook(lambda m, a, out: seen.update(fpn=out)),
        model.proposal_generator.rpn_head.register_forward_hook(lambda m, a, out: seen.update(rpn=out)),
        model.proposal_generator.register_forward_hook(lambda m, a, out: seen.update(proposals=out[0])),
        model.roi_heads.register_forward_hook(lambda m, a, out: seen.update(detections=out[0])),
    ]
    try:
        with exactly(case), torch.no_grad(), recorded_noise(model, case.device):
            images = model(_images(case))
    finally:
        for hook in hooks:
            hook.remove()
    results = _maps(seen, f"eval_r{ratio}") if ratio == 0.5 else []
    rows = zip(*seen["proposals"], seen["detections"].tolist(), images, strict=True)
    for i, (boxes, valid, detected, image) in enumerate(rows):
        key = f"eval_r{ratio}.im{i}"
        results.append(compare_proposals(key, boxes[valid]))
        detected = {name: value.cpu().numpy() for name, value in detected.items()}
        order, gap, out_of_place = _order(key, detected["boxes"])
        results += [gap, out_of_place]
        labels = (detected["labels"][order] != recorded().expected(f"{key}.labels")).sum()
        results.append(Measurement(f"{key}.labels", float(labels), 0.0, 0.0, 0.0))
        scores = np.abs(detected["scores"][order] - recorded().expected(f"{key}.scores")).max()
        results.append(near(f"{key}.scores", scores, SCORES))
        index = recorded().meta[f"{key}.mask_probs"]["index"]
        probabilities = take(detected["mask_probabilities"][order], index)
        gap = np.abs(probabilities - recorded().expected(f"{key}.mask_probs")).max()
        results.append(near(f"{key}.mask_probs", gap, MASKS))
        results += _masks(f"{key}.own", image, order)
    return results


def _maps(seen: dict, key: str) -> list[Measurement]:
    """Maps of FPN, and what the RPN predicts."""
    maps = dict(seen["fpn"])
    for i, (logits, deltas) in enumerate(zip(*seen["rpn"], strict=True)):
        height, width = seen["fpn"][f"p{i + 2}"].shape[-2:]
        maps[f"rpn_logits{i}"] = logits.unflatten(1, (height, width, 3)).permute(0, 3, 1, 2)
        maps[f"rpn_deltas{i}"] = deltas.unflatten(1, (height, width, 3)).permute(0, 3, 4, 1, 2).flatten(1, 2)
    keys = {name: f"{key}.{name}" for name in maps}
    return [
        near(keys[name], recorded().error(keys[name], value.cpu().numpy()), MAPS, recorded().floor(keys[name]))
        for name, value in maps.items()
    ]


def compare_proposals(key: str, boxes: torch.Tensor) -> Measurement:
    """Share of proposals (N, 4) that are not the recorded ones: those with nearly equal scores may differ."""
    name = f"{key}.proposal_boxes"
    gap = np.abs(take(boxes.cpu().numpy(), recorded().meta[name]["index"]) - recorded().expected(name)).max(axis=1)
    return near(name, (gap > BOXES).mean(), 0.01)


def _order(key: str, boxes: np.ndarray, tolerance: float = BOXES) -> tuple[np.ndarray, Measurement, Measurement]:
    """Index in ``boxes`` of each recorded box, how far they are, and the share that is out of place."""
    expected = recorded().expected(f"{key}.boxes")
    assert boxes.shape == expected.shape, f"{key}: {len(boxes)} detections, expected {len(expected)}"
    gaps = np.abs(boxes[None] - expected[:, None]).max(axis=2)
    order = gaps.argmin(axis=1)
    assert sorted(order) == list(range(len(boxes))), f"{key}: other boxes were detected"
    pixels = Measurement(f"{key}.boxes", float(gaps.min(axis=1).max()), tolerance, 0.0, _EPS * float(expected.max()))
    # Two scores that differ by rounding alone may change places.
    return order, pixels, near(f"{key}.order", (order != np.arange(len(boxes))).mean(), 0.05)


def _resized(case, model, image: int, size: tuple[int, int]) -> list[Measurement]:
    sizes = list(small.SIZES)
    sizes[image] = size
    with exactly(case), torch.no_grad(), recorded_noise(model, case.device):
        result = model(_images(case), output_sizes=sizes)[image]
    key = f"eval_r0.5.im{image}.to{size[0]}x{size[1]}"
    assert tuple(result["masks"].shape[1:]) == size, f"{key}: masks of {tuple(result['masks'].shape[1:])}"
    order, *results = _order(key, result["boxes"].cpu().numpy(), RESIZED_BOXES)
    return results + _masks(key, result, order)


def _masks(key: str, result: Mapping[str, torch.Tensor], order: np.ndarray) -> list[Measurement]:
    index = recorded().meta[f"{key}.boxes"]["index"]
    masks, boxes = result["masks"].cpu()[order], result["boxes"].cpu()[order].numpy()
    far = np.abs(take(boxes, index) - recorded().expected(f"{key}.boxes")).max()
    counts = np.abs(masks.sum((1, 2)).numpy() - recorded().expected(f"{key}.pixels")).max()
    results = [
        Measurement(f"{key}.boxes", float(far), RESIZED_BOXES, 0.0, _EPS * float(boxes.max())),
        Measurement(f"{key}.pixels", float(counts), PIXELS, 0.0, 0.0),
    ]
    if f"{key}.bits" in recorded().meta:
        expected = np.unpackbits(recorded().expected(f"{key}.bits"), axis=1)
        actual = masks[: len(expected)].flatten(1).numpy()
        worst = (actual != expected[:, : actual.shape[1]]).sum(axis=1).max()
        results.append(Measurement(f"{key}.bits", float(worst), PIXELS, 0.0, 0.0))
    return results


def benchmarking(case) -> list[Measurement]:
    """Features and gradients of Benchmarking-ViT's backbone."""
    golden, model = recorded("benchmarking_small"), small_benchmarking.small_backbone().to(case.device)
    backward = case.direction == "backward"
    with exactly(case), torch.set_grad_enabled(backward):
        features = model(ImageList(small_benchmarking.small_input().to(case.device), [(128, 100), (50, 128)]))
        values = dict(features)
        if backward:
            small_benchmarking.loss({k: v.cpu() for k, v in features.items()}).backward()
            values = {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    limit = (GRADIENTS if backward else FEATURES)[case.device]
    results = []
    for name, value in values.items():
        expected = golden.expected(name).astype(np.float64)
        part = value.detach().flatten()[::13].double().cpu().numpy()
        results.append(near(name, np.linalg.norm(part - expected) / np.linalg.norm(expected), limit))
    return results


def detectron2(case) -> list[Measurement]:
    """Our backbone in Detectron2's detector, beside the recordings of the original in it."""
    from ..detectron2.config import load_config
    from ..detectron2.require import require_detectron2

    require_detectron2()
    cfg = load_config("detectron2/mimdet_b_mask_rcnn", _upper(small.SMALL))
    model = instantiate(cfg.model).to(case.device)
    fill_module(model)
    return _of_detectron2(case, model)


def original(case, checkout: Path) -> list[Measurement]:
    """The original's own code from its checkout, beside its recordings: does it still give the same numbers here?"""
    model = _the_original(checkout).to(case.device)
    fill_module(model)
    return _of_detectron2(case, model)


def _the_original(checkout: Path) -> nn.Module:
    from ..bench.experiments.detectron2 import ORIGINAL_CONFIG, make_importable
    from ..detectron2.require import require_detectron2

    require_detectron2()
    from detectron2.config import LazyConfig
    from detectron2.config import instantiate as of_detectron2

    make_importable(checkout)
    # The original repeats the encoder's width and checkpointing in its decoder.
    changes = ["model.backbone.bottom_up.decoder.embed_dim=192", "model.backbone.bottom_up.decoder.checkpointing=False"]
    cfg = LazyConfig.load(str(checkout / ORIGINAL_CONFIG))
    return of_detectron2(LazyConfig.apply_overrides(cfg, [*_upper(small.SMALL), *changes]).model)


def _upper(overrides) -> list[str]:
    return [o.replace("=false", "=False") for o in overrides]


def _of_detectron2(case, model: nn.Module) -> list[Measurement]:
    """Losses or detections of a detector of Detectron2, with the recordings' tokens and candidates."""
    from detectron2.utils.events import EventStorage

    from ..bench.experiments.detectron2 import batch_of_detectron2

    bottom_up = model.backbone.bottom_up
    bottom_up.sample_ratio = bottom_up.inference_sample_ratio = 0.5
    batch = batch_of_detectron2(_images(case), targets())
    numbers = torch.from_numpy(noise(7, 2, 280)).to(case.device)
    tokens = mock.patch.object(torch, "rand", return_value=numbers)
    candidates = mock.patch.object(torch, "randperm", lambda n, **options: torch.arange(n, **options))
    with exactly(case), tokens, candidates, torch.no_grad():
        if case.size == "losses":
            with EventStorage(0):
                return compare_losses("train_polygons", model.train()(batch))
        results = []
        for i, result in enumerate(model.eval()(batch)):
            instances = result["instances"]
            values = {"boxes": instances.pred_boxes.tensor, "masks": instances.pred_masks}
            key = f"eval_r0.5.im{i}"
            order, *distances = _order(key, values["boxes"].cpu().numpy())
            scores = np.abs(instances.scores.cpu().numpy()[order] - recorded().expected(f"{key}.scores")).max()
            results += [*distances, near(f"{key}.scores", scores, SCORES), *_masks(f"{key}.own", values, order)]
        return results


def check_original(checkout: Path) -> None:
    """Raise FileNotFoundError unless this is a checkout of the original."""
    from ..bench.experiments.detectron2 import ORIGINAL_CONFIG

    if not (checkout / ORIGINAL_CONFIG).is_file():
        raise FileNotFoundError(f"{checkout} is not a checkout of the original MIMDet: it has no {ORIGINAL_CONFIG}")


def _images(case) -> list[torch.Tensor]:
    return [image.to(case.device) for image in small.make_images(seed=11)]


def _to(device: str, truth: list[dict]) -> list[dict]:
    return [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in truth]


PARTS: dict[str, Callable] = {
    "backbone": backbone,
    "benchmarking": benchmarking,
    "losses": losses,
    "detections": detections,
    "detectron2": detectron2,
    "original": original,
}
# Other people's detectors: auto alone.
BESIDE = ("detectron2", "original")
_ALL = ("fp32", "bf16", "fp16")
_SINGLE = ("fp32",)
# Level -> what it adds to the one before: part, size, direction, dtypes.
_LISTED = {
    "quick": [
        ("backbone", "ratio0.5", "forward", _SINGLE),
        ("losses", "polygons", "forward", _SINGLE),
        ("detections", "ratio0.5", "forward", _SINGLE),
    ],
    "default": [
        *(("backbone", f"ratio{ratio}", "forward", _SINGLE) for ratio in RATIOS if ratio != 0.5),
        ("backbone", "ratio0.5", "forward", _ALL[1:]),
        ("backbone", "ratio0.5", "backward", _SINGLE),
        *(("benchmarking", "small", direction, _SINGLE) for direction in ("forward", "backward")),
        ("losses", "polygons", "backward", _SINGLE),
        *((other, what, "forward", _SINGLE) for other in BESIDE for what in ("losses", "detections")),
    ],
    "full": [
        *(("losses", truth, "backward", _SINGLE) for truth in ("bitmasks", "one_empty", "two_parts", "all_empty")),
        ("detections", "ratio1.0", "forward", _SINGLE),
        ("detections", "image1:300x600", "forward", _SINGLE),
        ("detections", "image0:337x480", "forward", _SINGLE),
    ],
}


def listed(level: str) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Part, size, direction and dtypes of every case of a level."""
    for name, rows in _LISTED.items():
        yield from rows
        if name == level:
            return


def refusal(op: str) -> str | None:
    """Why a part cannot be compared here; None if it can."""
    if op in BESIDE and importlib.util.find_spec("detectron2") is None:
        return "Detectron2 is not installed"
    return None
