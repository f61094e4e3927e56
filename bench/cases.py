"""Inputs of every operation in MIMDet-Base, its baselines, and the fewest bytes that it must move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.checkpoint import checkpoint
from torchvision.ops import box_iou

from ..kernels import (
    add_layer_norm,
    attention_varlen_packed,
    batch_norm,
    bias_gelu,
    gather_add_pos,
    group_norm_gelu,
    layer_norm_gelu,
    match_boxes,
    nms_slots,
    rasterize_polygons,
    roi_align_levels,
    sample_tokens,
    scatter_fill,
)
from ..testing import plain
from .session import DTYPES

Tensors = dict[str, torch.Tensor]
Outputs = tuple[torch.Tensor, ...]

_RATIO = 0.5
# Place of ROIAlign -> boxes of an image in training, and cells along a side of their pooled maps.
_BOXES = {"boxes": (512, 7), "masks": (128, 14)}
_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes:
        op: name.
        name: where the model uses it.
        shape: of the main input.
        dtype: one of ``session.DTYPES``: of the main input. The residual stream and the position embedding are
            float32, as they are under autocast.
        inputs: random tensors by name, on the CPU.
        run: (inputs, impl) -> outputs.
        moved: direction -> fewest bytes read and written.
        differentiable: inputs that get a gradient; empty for an operation without.
        flops: direction -> multiplications and additions of its matrix products.
        baselines: other code for it, by name.
        terms: see ``equality.mismatch``.
        comparable: outputs -> those that all implementations must agree on.
        reference: correct outputs, if not those of "eager".
        kernels_op: the registered operation that implements it.
    """

    op: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    inputs: Callable[[], Tensors]
    run: Callable[[Tensors, str], Outputs]
    moved: dict[str, int]
    differentiable: tuple[str, ...] = ()
    flops: dict[str, int] = field(default_factory=dict)
    baselines: dict[str, Callable[[Tensors], Outputs]] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)
    comparable: Callable[[Outputs], Outputs] = tuple
    reference: Callable[[Tensors], Outputs] | None = None
    kernels_op: str = ""

    def make(self, device: str) -> Tensors:
        """Its inputs on a device."""
        return {name: tensor.to(device) for name, tensor in self.inputs().items()}


def cases(op: str, dtype: str, height: int, width: int, batches: Sequence[int]) -> list[Case]:
    """The operation wherever MIMDet-Base uses it, for images of this size and each batch.

    Raises:
        ValueError: an unknown operation.
    """
    if op not in OPS:
        raise ValueError(f"no operation {op!r}; choose from {', '.join(OPS)}")
    grid, tokens = (height // 16, width // 16), (height // 16) * (width // 16)
    kept = int(tokens * _RATIO)
    stem = [(f"stage {i + 1}", (96 * 2**i, grid[0] * 2 ** (3 - i), grid[1] * 2 ** (3 - i))) for i in range(4)]
    places = {
        "add_layer_norm": [("encoder", (kept, 768)), ("decoder", (tokens, 512))],
        "attention_varlen": [("encoder", (kept, 12, 64)), ("decoder", (tokens, 16, 32))],
        "batch_norm": [(f"FPN p{i + 2}", (256, grid[0] * 4 >> i, grid[1] * 4 >> i)) for i in range(4)],
        "bias_gelu": [("encoder", (kept, 3072)), ("decoder", (tokens, 2048))],
        "decoder_assembly": [("decoder", (tokens, 512))],
        "gather_add_pos": [("encoder", (tokens, 768))],
        "group_norm_gelu": stem,
        "layer_norm_gelu": stem,
        "match_boxes": [("RPN", (3 * sum(tokens * 16 >> 2 * i for i in range(5)), 7))],
        "nms_slots": [("RPN", (5, 2000))],
        "rasterize_polygons": [("mask head", (128, 28))],
        "roi_align_levels": [(name, (256, height // 4, width // 4)) for name in _BOXES],
        "sample_tokens": [("encoder", (tokens,))],
        "scatter_fill": [("decoder", (tokens, 512))],
    }
    return [OPS[op](name, (batch, *shape), dtype) for batch in batches for name, shape in places[op]]


def case(op: str, dtype: str, shape: Sequence[int]) -> Case:
    """The operation on one shape: (B, N, C), or (B, N, heads, head_dim) for attention, (B, C, H, W) for the norms of
    images and for the finest map of ROIAlign, (B, L) for sampling, (B, anchors, boxes) for matching,
    (B, problems of an image, boxes) for NMS, (B, boxes, size) for polygons.

    Raises:
        ValueError: an unknown operation, or a shape of another rank.
    """
    rank = len(cases(op, dtype, 64, 64, (1,))[0].shape)
    if len(shape) != rank or min(shape) < 1:
        raise ValueError(f"{op}: the shape must have {rank} positive sizes, got {'x'.join(map(str, shape))}")
    return OPS[op]("given", tuple(shape), dtype)


OPS: dict[str, Callable[[str, tuple[int, ...], str], Case]] = {}


def _operation(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Register ``build(name, shape, dtype)``, which gives the rest of ``Case``, under its name."""
    op = build.__name__.strip("_")

    def complete(name: str, shape: tuple[int, ...], dtype: str) -> Case:
        common = {"op": op, "kernels_op": op, "name": name, "shape": shape, "dtype": dtype}
        return Case(**common | build(name, shape, DTYPES[dtype]))

    OPS[op] = complete
    return build


def _normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _sample(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(0))
    return sample_tokens(noise, torch.ones_like(noise, dtype=torch.bool), _RATIO, impl="eager")


def _repeated(index: torch.Tensor, channels: int) -> torch.Tensor:
    """The index as the original gathers with it: an int64 for each element."""
    return index.unsqueeze(-1).repeat(1, 1, channels)


def _sums(count: int, *names: str) -> dict[str, int]:
    """``Case.terms`` of the gradients of these inputs."""
    return dict.fromkeys((f"gradient of {name}" for name in names), count)


@_operation
def _add_layer_norm(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    size, count, channels = dtype.itemsize, prod(shape), shape[-1:]
    return {
        "inputs": lambda: {
            "residual": _normal(shape, 0),
            "x": _normal(shape, 1, dtype),
            "scale": (torch.arange(shape[0]) % 8 != 7).float() / 0.9,
            "weight": 1 + 0.1 * _normal(channels, 2),
            "bias": _normal(channels, 3),
        },
        "run": lambda t, impl: add_layer_norm(*t.values(), _EPS, dtype=t["x"].dtype, impl=impl),
        "differentiable": ("residual", "x", "weight", "bias"),
        # Forward: residual, x in; their sum, y out. Backward: the sum, both gradients in; both gradients out.
        "moved": {"forward": count * (4 + size + 4 + size), "backward": count * (4 + 4 + size + 4 + size)},
        "terms": _sums(prod(shape[:-1]), "weight", "bias"),
    }


@_operation
def _attention_varlen(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Sequences of one length, packed as the linear layer's output."""
    batch, length, heads, head_dim = shape
    size, count = dtype.itemsize, prod(shape)

    def original(t: Tensors) -> Outputs:
        q, k, v = t["qkv"].unflatten(0, (batch, length)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * head_dim**-0.5
        # Autocast's softmax is in float32.
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
        return ((weights @ v).transpose(1, 2).flatten(0, 1),)

    def one_by_one(t: Tensors) -> Outputs:
        """Has the scores of one sequence at a time in memory."""

        def alone(rows: torch.Tensor) -> torch.Tensor:
            return attention_varlen_packed(rows, t["cu_seqlens"][:2], length, impl="eager")

        return (torch.cat([checkpoint(alone, rows, use_reentrant=False) for rows in t["qkv"].split(length)]),)

    return {
        "inputs": lambda: {
            "qkv": _normal((batch * length, 3, heads, head_dim), 0, dtype),
            "cu_seqlens": length * torch.arange(batch + 1, dtype=torch.int32),
        },
        "run": lambda t, impl: (attention_varlen_packed(t["qkv"], t["cu_seqlens"], length, impl=impl),),
        "differentiable": ("qkv",),
        # Forward: q, k, v in; out. Backward: those and its gradient in; three gradients out.
        "moved": {"forward": 4 * count * size, "backward": 8 * count * size},
        # Two products of N x N x head_dim a head; backward five, the scores again among them.
        "flops": {"forward": 4 * count * length, "backward": 10 * count * length},
        "baselines": {"original": original},
        "reference": one_by_one,
    }


@_operation
def _bias_gelu(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    moved = prod(shape) * dtype.itemsize
    return {
        "inputs": lambda: {"x": _normal(shape, 0, dtype), "bias": _normal(shape[-1:], 1)},
        "run": lambda t, impl: (bias_gelu(t["x"], t["bias"], impl=impl),),
        "differentiable": ("x", "bias"),
        "moved": {"forward": 2 * moved, "backward": 3 * moved},
        "terms": _sums(prod(shape[:-1]), "bias"),
    }


def _image_norm(shape: tuple[int, ...], dtype: torch.dtype, parameters: torch.dtype, run: Callable) -> dict[str, Any]:
    """x (B, C, H, W) in channels_last memory, weight and bias (C,)."""
    moved = prod(shape) * dtype.itemsize
    return {
        "inputs": lambda: {
            "x": _normal(shape, 0, dtype).contiguous(memory_format=torch.channels_last),
            "weight": (1 + 0.1 * _normal(shape[1:2], 1)).to(parameters),
            "bias": _normal(shape[1:2], 2, parameters),
        },
        "run": lambda t, impl: (run(t["x"], t["weight"], t["bias"], eps=_EPS, impl=impl),),
        "differentiable": ("x", "weight", "bias"),
        "moved": {"forward": 2 * moved, "backward": 3 * moved},
        "terms": _sums(prod(shape) // shape[1], "weight", "bias"),
    }


@_operation
def _batch_norm(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """With ReLU, in training, in one process; parameters are float32 as they are under autocast."""

    def pytorch(t: Tensors) -> Outputs:
        return (F.relu(F.batch_norm(t["x"], None, None, t["weight"], t["bias"], training=True, eps=_EPS)),)

    run = partial(batch_norm, training=True, relu=True)
    return _image_norm(shape, dtype, torch.float32, run) | {"baselines": {"batch_norm, relu": pytorch}}


@_operation
def _group_norm_gelu(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    return _image_norm(shape, dtype, dtype, group_norm_gelu)


@_operation
def _layer_norm_gelu(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    def layer_norm_2d(t: Tensors) -> Outputs:
        """The channel-wise LayerNorm of ConvNeXt and of Detectron2's models, step by step, and GELU."""
        x = t["x"]
        x_centered = x - x.mean(1, keepdim=True)
        x_hat = x_centered / torch.sqrt(x_centered.pow(2).mean(1, keepdim=True) + _EPS)
        return (F.gelu(t["weight"][:, None, None] * x_hat + t["bias"][:, None, None]),)

    return _image_norm(shape, dtype, dtype, layer_norm_gelu) | {"baselines": {"LayerNorm2d": layer_norm_2d}}


@_operation
def _match_boxes(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Anchors of all images, of five sizes, and COCO's mean number of boxes an image."""
    batch, count, slots = shape
    low, high = thresholds = 0.3, 0.7

    def inputs() -> Tensors:
        generator = torch.Generator().manual_seed(0)
        side = 32 * 2 ** (torch.arange(count) * 5 // count)[:, None]
        centers = 1000 * torch.rand(count, 2, generator=generator)
        boxes = torch.rand(batch, slots, 2, generator=generator).repeat(1, 1, 2) * 800
        boxes[..., 2:] += 20 + 200 * torch.rand(batch, slots, 2, generator=generator)
        counts = torch.full((batch,), slots, dtype=torch.int32)
        anchors = torch.cat([centers - side / 2, centers + side / 2], dim=1)
        return {"boxes": boxes, "counts": counts, "candidates": anchors}

    def run(t: Tensors, impl: str) -> Outputs:
        t = t | {name: t[name].float() for name in ("boxes", "candidates")}
        return match_boxes(**t, thresholds=thresholds, labels=(0, -1, 1), low_quality=True, impl=impl)

    def detectron2(t: Tensors) -> Outputs:
        """All overlaps of an image in memory, one image after the other."""
        matched = []
        for boxes in t["boxes"]:
            overlaps = box_iou(boxes, t["candidates"])
            best, index = overlaps.max(dim=0)
            label = -((best >= low) & (best < high)).to(torch.int8)
            label[(best >= high) | (overlaps == overlaps.amax(dim=1, keepdim=True)).any(dim=0)] = 1
            matched.append((index.int(), label))
        index, label = zip(*matched, strict=True)
        return torch.stack(index), torch.stack(label)

    moved = {"forward": batch * (slots * 16 + 4 + count * 5) + count * 16}
    return {"dtype": "fp32", "inputs": inputs, "run": run, "moved": moved, "baselines": {"Detectron2": detectron2}}


@_operation
def _nms_slots(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Proposals around 50 objects a problem, half of them at most to be kept; boxes are float32 in every dtype."""
    batch, each, rows = shape
    problems, stop_at, threshold = batch * each, -(-rows // 2), 0.7

    def inputs() -> Tensors:
        generator = torch.Generator().manual_seed(0)
        centers, sides = (torch.rand(50, 2, generator=generator) * size for size in (900.0, 150.0))
        which = torch.randint(50, (problems, rows), generator=generator)
        noise = torch.randn(problems, rows, 4, generator=generator) * 0.15
        side = (20 + sides[which]) * noise[..., 2:].exp()
        corner = centers[which] + noise[..., :2] * sides[which] - side / 2
        boxes = torch.cat([corner, corner + side], dim=-1)
        return {"boxes": boxes, "valid": torch.ones(problems, rows, dtype=torch.bool)}

    def run(t: Tensors, impl: str) -> Outputs:
        # The exact result is that of float32 boxes, which the check has as float64.
        return (nms_slots(t["boxes"].float(), t["valid"], threshold, stop_at, impl=impl),)

    def one_by_one(t: Tensors) -> Outputs:
        keep = torch.zeros_like(t["valid"])
        scores = torch.arange(rows, 0, -1, dtype=torch.float32, device=keep.device)
        for boxes, kept in zip(t["boxes"], keep, strict=True):
            kept[torchvision.ops.nms(boxes, scores, threshold)[:stop_at]] = True
        return (keep,)

    moved = {"forward": problems * rows * 18}
    return {"dtype": "fp32", "inputs": inputs, "run": run, "moved": moved, "baselines": {"torchvision": one_by_one}}


@_operation
def _rasterize_polygons(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """As many boxes an image as enter the mask loss, on instances of COCO's mean: 7 an image, of 24 points each."""
    batch, count, size = shape
    instances, corners = 7 * batch, 24

    def inputs() -> Tensors:
        generator = torch.Generator().manual_seed(0)
        centers, radii, shift = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (instances,) * 3)
        centers, radii = 200 + 600 * centers, 10 + 150 * radii
        angles = torch.arange(corners) * (2 * torch.pi / corners)
        circle = torch.stack([angles.cos(), angles.sin()], dim=1)
        wobble = 0.6 + 0.4 * torch.rand(instances, corners, 1, generator=generator, dtype=torch.float64)
        boxes = torch.cat([centers - radii, centers + radii], dim=1).float()
        index = torch.arange(batch * count) % instances
        jitter = 0.2 * (shift - 0.5) * radii
        return {
            "points": (centers[:, None] + radii[:, None] * circle * wobble).flatten(0, 1),
            "polygon_starts": torch.arange(0, instances * corners + 1, corners, dtype=torch.int32),
            "instance_starts": torch.arange(instances + 1, dtype=torch.int32),
            "index": index,
            "boxes": (boxes + jitter.repeat(1, 2))[index],
        }

    def pycocotools(t: Tensors) -> Outputs:
        """On the CPU, one box after the other: Detectron2's way."""
        on_cpu = {key: tensor.cpu() for key, tensor in t.items()}
        return (plain.rasterize_polygons(**on_cpu, size=size).to(t["points"].device),)

    return {
        "dtype": "fp32",
        "inputs": inputs,
        "run": lambda t, impl: (rasterize_polygons(**t, size=size, impl=impl),),
        "moved": {"forward": instances * corners * 16 + batch * count * (8 + 16 + size * size)},
        "baselines": {"pycocotools": pycocotools},
    }


@_operation
def _sample_tokens(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Its noise is float32 whatever the model computes in."""

    def inputs() -> Tensors:
        noise = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
        return {"noise": noise, "valid_mask": torch.ones_like(noise, dtype=torch.bool)}

    def original(t: Tensors) -> Outputs:
        # The original sorts twice in the encoder, and once more in the decoder to invert ids_restore.
        order = torch.argsort(t["noise"].masked_fill(~t["valid_mask"], 100), dim=1)
        restore = torch.argsort(order, dim=1)
        kept = int(shape[1] * _RATIO)
        return order[:, :kept], torch.argsort(restore, dim=1)[:, kept:], restore

    def comparable(outputs: Outputs) -> Outputs:
        ids_keep, ids_mask, ids_restore = outputs
        order = torch.cat([ids_keep, ids_mask], dim=1)
        return ids_keep.sort(dim=1).values, ids_mask.sort(dim=1).values, order.gather(1, ids_restore)

    return {
        "dtype": "fp32",
        "inputs": inputs,
        "run": lambda t, impl: tuple(sample_tokens(t["noise"], t["valid_mask"], _RATIO, impl=impl)),
        "moved": {"forward": prod(shape) * (4 + 1 + 2 * 8)},
        "baselines": {"original": original},
        "comparable": comparable,
    }


@_operation
def _gather_add_pos(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    batch, length, channels = shape
    size, kept = dtype.itemsize, batch * int(length * _RATIO)

    def original(t: Tensors) -> Outputs:
        return (torch.gather(t["x"] + t["pos"], 1, _repeated(t["index"], channels)),)

    def fancy(t: Tensors) -> Outputs:
        rows = torch.arange(batch, device=t["x"].device)[:, None]
        return (t["x"][rows, t["index"]] + t["pos"][t["index"]],)

    def in_place(t: Tensors) -> Outputs:
        starts = length * torch.arange(batch, device=t["x"].device)[:, None]
        rows = t["x"].view(-1, channels).index_select(0, (t["index"] + starts).flatten())
        return (t["pos"].index_select(0, t["index"].flatten()).add_(rows).view(batch, -1, channels),)

    rows_read = min(kept, length)  # of pos, shared by the batch
    return {
        "inputs": lambda: {
            "x": _normal(shape, 0, dtype),
            "pos": _normal(shape[1:], 1),
            "index": _sample(batch, length)[0],
        },
        "run": lambda t, impl: (gather_add_pos(t["x"], t["pos"], t["index"], impl=impl),),
        "differentiable": ("x",),
        "moved": {
            "forward": kept * (channels * (size + 4) + 8) + rows_read * channels * 4,
            "backward": kept * (channels * 4 + 8) + batch * length * channels * size,
        },
        "baselines": {"original": original, "x[i] + p[i]": fancy, "index_select add_": in_place},
    }


@_operation
def _scatter_fill(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    batch, length, channels = shape
    total, size, kept = batch * length, dtype.itemsize, int(length * _RATIO)

    def original(t: Tensors) -> Outputs:
        rows = torch.cat([t["kept"], t["fill"]], dim=1)
        return (torch.gather(rows, 1, _repeated(t["ids_restore"], channels)) + t["pos"],)

    return {
        "inputs": lambda: {
            "kept": _normal((batch, kept, channels), 0, dtype),
            "fill": _normal((batch, length - kept, channels), 1, dtype),
            "ids_restore": _sample(batch, length)[2],
            "pos": _normal(shape[1:], 2),
        },
        "run": lambda t, impl: (scatter_fill(*t.values(), impl=impl),),
        "differentiable": ("kept", "fill"),
        "moved": {
            "forward": total * (channels * (size + 4) + 8) + length * channels * 4,
            "backward": total * (channels * (4 + size) + 8),
        },
        "baselines": {"original": original},
    }


@_operation
def _roi_align_levels(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    batch, channels, height, width = shape
    boxes, side = _BOXES.get(name, (32, 7))
    grids = {f"p{2 + i}": (-(-height // 2**i), -(-width // 2**i)) for i in range(4)}

    def inputs() -> Tensors:
        levels = {p: _normal((batch, channels, *grid), i, dtype) for i, (p, grid) in enumerate(grids.items())}
        levels = {p: m.contiguous(memory_format=torch.channels_last) for p, m in levels.items()}
        # Sides from a thirtieth of the image's to all of it, about places anywhere: boxes for every level.
        generator = torch.Generator().manual_seed(9)
        ends = torch.tensor([4.0 * width, 4.0 * height])
        half = ends / 2 * 10 ** (-1.5 * torch.rand(batch, boxes, 1, generator=generator))
        places = ends * torch.rand(batch, boxes, 2, generator=generator)
        corners = [torch.minimum((places + sign * half).clamp(min=0), ends) for sign in (-1, 1)]
        return levels | {"boxes": torch.cat(corners, -1)}

    def run(t: Tensors, impl: str) -> Outputs:
        valid = torch.ones(batch, boxes, dtype=torch.bool, device=t["boxes"].device)
        scales = [2.0**-i for i in range(2, 6)]
        canonical = 4 * width / 6  # 224 of 1344 pixels
        maps = [t[p] for p in grids]
        return (roi_align_levels(maps, t["boxes"], valid, side, scales, canonical_size=canonical, impl=impl),)

    numbers = (batch * sum(map(prod, grids.values())) + batch * boxes * side**2) * channels
    moved = numbers * dtype.itemsize + batch * boxes * 16
    return {
        "inputs": inputs,
        "run": run,
        "differentiable": tuple(grids),
        "moved": {"forward": moved, "backward": moved},
        "terms": _sums(boxes, *grids),
    }


@_operation
def _decoder_assembly(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """``scatter_fill`` with the projection of the ConvStem's rows, whose input is 1.5 times as wide."""
    batch, length, channels = shape
    size, kept, wide = dtype.itemsize, int(length * _RATIO), channels * 3 // 2

    def inputs() -> Tensors:
        _, ids_mask, ids_restore = _sample(batch, length)
        return {
            "kept": _normal((batch, kept, channels), 0, dtype),
            "stem": _normal((batch, length, wide), 1, dtype),
            "weight": (_normal((channels, wide), 2) / wide**0.5).to(dtype),
            "bias": _normal((channels,), 3, dtype),
            "ids_mask": ids_mask,
            "ids_restore": ids_restore,
            "pos": _normal(shape[1:], 4),
        }

    def run(t: Tensors, impl: str) -> Outputs:
        fill = F.linear(gather_add_pos(t["stem"], None, t["ids_mask"], impl=impl), t["weight"], t["bias"])
        return (scatter_fill(t["kept"], fill, t["ids_restore"], t["pos"], impl=impl),)

    def original(t: Tensors) -> Outputs:
        fill = F.linear(t["stem"], t["weight"], t["bias"])
        order = torch.argsort(t["ids_restore"], dim=1)
        fill = torch.gather(fill, 1, _repeated(order, channels))
        rows = torch.cat([t["kept"], fill[:, kept:]], dim=1)
        return (torch.gather(rows, 1, _repeated(t["ids_restore"], channels)) + t["pos"],)

    rows, dropped = batch * length, batch * (length - kept)
    flops, weights = 2 * dropped * channels * wide, channels * wide
    written = rows * (channels * 4 + 8)
    forward = (batch * kept * channels + dropped * wide + weights) * size
    backward = (batch * kept * channels + dropped * wide + rows * wide + 2 * weights) * size
    return {
        "kernels_op": "scatter_fill",
        "inputs": inputs,
        "run": run,
        "differentiable": ("kept", "stem", "weight", "bias"),
        "moved": {"forward": forward + written + length * channels * 4, "backward": backward + written},
        "flops": {"forward": flops, "backward": 2 * flops},
        "baselines": {"original": original},
        "terms": {"output 0": wide} | _sums(channels, "stem") | _sums(dropped, "weight", "bias"),
    }


OPS = dict(sorted(OPS.items()))
