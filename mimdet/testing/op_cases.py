"""Inputs for every operation, at any size, dtype and layout, and how far an implementation is from the exact result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .. import kernels
from ..kernels import OPS, dispatch, valid_mask
from ..kernels.dispatch import BF16, F16, F32
from . import plain
from .budget import Measurement, assert_same_kind, measure

EPS = 1e-6
# Operations by what they have in common.
IMAGES = ("batch_norm", "group_norm_gelu", "layer_norm_gelu")
NORMS = ("add_layer_norm", *IMAGES)
MAPS = (*IMAGES, "roi_align_levels")
PADDED = (*MAPS, "scatter_fill")
MIXING = ("batch_norm",)  # the result of an image depends on the others
PACKED = ("attention_varlen",)  # tokens of all images in one dimension
DISCRETE = ("match_boxes", "nms_slots", "rasterize_polygons", "sample_tokens")
DIFFERENTIABLE = tuple(op for op in OPS if op not in DISCRETE)

# Optional arguments -> what leaves them out.
OPTIONAL = {
    "add_layer_norm": {"x": None, "scale": None},
    "batch_norm": {"weight": None, "bias": None, "relu": False},
    "gather_add_pos": {"pos": None},
    "match_boxes": {"outside": None, "low_quality": False},
}

DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "offset", "expanded")
# Arguments of ``case``. Neither "odd" nor "wide" fills a vector or a tile.
SIZES = {
    "small": {},
    "odd": {"batch": 3, "length": 35, "channels": 33},
    "wide": {"length": 12, "channels": 1000},
    "model": {"length": 196, "channels": 192},
    # Of norms alone: a variance as small as epsilon, and a mean that is large beside the standard deviation.
    "faint": {"mean": 0.0, "std": 1e-3},
    "far": {"mean": 8.0},
    # Of ``PADDED`` alone: images of other sizes than their batch, and NaN around them in maps.
    "padded": {"batch": 3, "length": 36, "padded": True},
    # Of operations with optional arguments alone: without them.
    "bare": {"bare": True},
}

# Gradients of outputs, from the outputs.
Upstream = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Case(NamedTuple):
    """Arguments of an operation.

    Attributes:
        op: name in ``mimdet.kernels.OPS``.
        inputs: float tensors that get gradients by name, the main one first.
        others: all other arguments by name.
        id: ``op-dtype-layout-size``, of cases from ``cases``.
    """

    op: str
    inputs: dict[str, torch.Tensor]
    others: dict[str, Any]
    id: str = ""

    def __call__(self, impl: str | None = None, **inputs: torch.Tensor):
        """The operation by ``impl``, of ``inputs`` in place of the case's."""
        return public(self.op)(**{**self.inputs, **inputs}, **self.others, impl=impl)

    def plain(self, impl: str | None = None, **inputs: torch.Tensor):
        """The operation by PyTorch, torchvision or pycocotools, of CPU tensors."""
        return getattr(plain, self.op)(**{**self.inputs, **inputs}, **self.others)

    def on_cpu(self, dtype: torch.dtype | None = None) -> Case:
        """The same on the CPU, ``inputs`` in ``dtype``."""
        others = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in self.others.items()}
        return self._replace(inputs={k: v.to("cpu", dtype) for k, v in self.inputs.items()}, others=others)

    def check(self, function: Callable) -> list[Measurement]:
        """Compare your implementation: output and gradients of ``function(**inputs, **others)``.

        Returns:
            for each output and gradient, its error and budget.

        Raises:
            AssertionError: shape, dtype or error of one is wrong; names the case and the tensor.
        """

        def run(**inputs):
            return function(**inputs, **self.others)

        return judge(self, differentiate(self, None, function=run))


def cases(
    op: str, dtype: str | torch.dtype | None = None, layout: str | None = None, device: str = "cpu"
) -> Iterator[Case]:
    """Inputs of an operation for a test of a port or a kernel, in every size of ``SIZES``.

    ::

        for case in mimdet.testing.cases("bias_gelu", dtype="bf16"):
            case.check(my_bias_gelu)  # called as my_bias_gelu(x=..., bias=...)

    Random numbers are fixed and rounded to the dtype, so that float64 holds them exactly. Box operations and token
    sampling have one dtype, and no gradient. The two levels of ``roi_align_levels`` come as ``fine`` and ``coarse``.

    Args:
        op: name in ``mimdet.kernels.OPS``.
        dtype: of the main inputs, a name in ``DTYPES`` or a dtype; None: all.
        layout: of the main inputs, in ``LAYOUTS``; None: all that the operation's shapes have.
        device: of all tensors.

    Raises:
        ValueError: no such operation, dtype or layout, or the operation does not have it.
    """
    if op not in OPS:
        raise ValueError(f"mimdet.testing.cases: no operation {op!r}; there are {', '.join(OPS)}")
    if isinstance(dtype, torch.dtype):
        dtype = next((name for name, known in DTYPES.items() if known == dtype), str(dtype))
    for name, value, known in (("dtype", dtype, dtypes_of(op)), ("layout", layout, layouts_of(op))):
        if value is not None and value not in known:
            raise ValueError(f"mimdet.testing.cases: {op} has no {name} {value!r}; there are {', '.join(known)}")
    return _cases(op, [dtype] if dtype else dtypes_of(op), [layout] if layout else layouts_of(op), device)


def _cases(op, dtypes, layouts_, device):
    for dtype in dtypes:
        for layout in layouts_:
            for size in sizes_of(op):
                example = case(op, dtype=DTYPES[dtype], layout=layout, device=device, **SIZES[size])
                yield example._replace(id=f"{op}-{dtype}-{layout}-{size}")


def dtypes_of(op: str) -> tuple[str, ...]:
    """Names of the dtypes that an operation's cases have."""
    return ("fp32",) if op in DISCRETE else tuple(DTYPES)


def layouts_of(op: str) -> tuple[str, ...]:
    """Names of the layouts that an operation's cases have."""
    # Boxes that are all equal would test nothing.
    has = {"channels_last": op in MAPS, "expanded": op not in DISCRETE}
    return tuple(name for name in LAYOUTS if has.get(name, True))


def sizes_of(op: str) -> tuple[str, ...]:
    """Names in ``SIZES`` that an operation's cases have."""
    has = {"faint": op in NORMS, "far": op in NORMS, "padded": op in PADDED, "bare": op in OPTIONAL}
    return tuple(name for name in SIZES if has.get(name, True))


def public(op: str) -> Callable:
    """The public function; attention's is the one that the model calls, ROIAlign's takes its levels one by one."""
    if op == "roi_align_levels":
        return roi_align_levels
    return getattr(kernels, "attention_varlen_packed" if op == "attention_varlen" else op)


def roi_align_levels(fine: torch.Tensor, coarse: torch.Tensor, **arguments) -> torch.Tensor:
    """Of two levels: names for the tensors of a list."""
    return kernels.roi_align_levels([fine, coarse], **arguments)


def case(
    op: str,
    batch: int = 2,
    length: int = 6,
    channels: int = 24,
    dtype: torch.dtype = F32,
    parameters: torch.dtype = F32,
    mean: float = 0.5,
    std: float = 1.0,
    layout: str | None = None,
    padded: bool = False,
    bare: bool = False,
    device: str = "cpu",
) -> Case:
    """Quantized random arguments of ``op``.

    Args:
        op: an operation.
        batch, length, channels: B, the number of tokens or positions, C. Images of ``PACKED`` have that many tokens
            on average.
        dtype: of the main inputs.
        parameters: dtype of weight, bias and position embedding.
        mean, std: of the main input.
        layout: name in ``LAYOUTS`` for the main inputs; by default dense.
        padded: of ``PADDED``: images have other sizes than their batch.
        bare: of ``OPTIONAL``: without these arguments.
        device: of all tensors.
    """
    if bare:
        return _bare(case(op, batch, length, channels, dtype, parameters, mean, std, layout, padded, device=device))

    def main(*shape, seed=0):
        return lay_out(quantized(*shape, dtype=dtype, mean=mean, std=std, seed=seed).to(device), layout)

    def tokens(count, seed=0):
        return main(batch, count, channels, seed=seed)

    affine = {
        "weight": quantized(channels, dtype=parameters, seed=1, mean=1.0, std=0.3).to(device),
        "bias": quantized(channels, dtype=parameters, seed=2, std=0.3).to(device),
    }
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)).argsort(dim=1).to(device)
    pos = quantized(length, channels, dtype=parameters, seed=3).to(device)
    kept = length // 2
    if op == "add_layer_norm":
        inputs = {"residual": tokens(length), "x": tokens(length, seed=4), **affine}
        return Case(op, inputs, {"scale": torch.arange(batch, device=device) % 3 * 1.25, "eps": EPS})
    if op == "attention_varlen":
        # Equal tokens would have zero gradients but for rounding, so heads are expanded instead.
        return Case(op, *_sequences(main, batch, length, channels, device, by_head=layout == "expanded"))
    if op == "bias_gelu":
        return Case(op, {"x": tokens(length), "bias": affine["bias"]}, {})
    if op == "gather_add_pos":
        return Case(op, {"x": tokens(length), "pos": pos}, {"index": order[:, :kept]})
    if op in IMAGES:
        others = {"eps": EPS} | ({"training": True, "relu": True} if op == "batch_norm" else {})
        x = main(batch, channels, *_sides(length))
        if padded:
            sizes = _sizes(batch, x.shape[2:]).to(device)
            x = lay_out(x.masked_fill(~valid_mask(sizes, x.shape[2:])[:, None], torch.nan), layout)
            others["sizes"] = sizes
        return Case(op, {"x": x, **affine}, others)
    if op == "match_boxes":
        return Case(op, {}, _laid_out(_boxes(batch, length, channels, device), layout))
    if op == "nms_slots":
        return Case(op, {}, _laid_out(_overlapping(batch, length, device), layout))
    if op == "rasterize_polygons":
        return Case(op, {}, _laid_out(_polygons(batch, length, channels, device), layout))
    if op == "roi_align_levels":
        maps = {"fine": main(batch, channels, 8, 9), "coarse": main(batch, channels, 4, 5, seed=4)}
        sizes = torch.stack([_sizes(batch, m.shape[2:]) for m in maps.values()]).to(device)
        return Case(op, maps, _regions(batch, length, device) | ({"sizes": sizes} if padded else {}))
    if op == "sample_tokens":
        noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)).to(device)
        return Case(op, {}, _laid_out({"noise": noise, "valid_mask": noise > 0.1, "ratio": 0.5}, layout))
    assert op == "scatter_fill", op
    filled = length - kept - 3 * padded
    inputs = {"kept": tokens(kept), "fill": tokens(filled, seed=4), "pos": pos}
    return Case(op, inputs, {"ids_restore": order.where(order < kept + filled, -1)})


def _bare(example):
    absent = OPTIONAL[example.op]
    inputs = {k: v for k, v in example.inputs.items() if k not in absent}
    return example._replace(inputs=inputs, others=example.others | absent)


def _sequences(main, batch, length, channels, device, by_head):
    """Tokens of ``batch`` images, the first shorter than ``length``, the last longer, and all other arguments."""
    heads = next(n for n in range(2, channels + 1) if channels % n == 0 and channels // n <= 64)
    total, head_dim = batch * length, channels // heads
    qkv = main(heads, total, 3, head_dim).permute(1, 2, 0, 3) if by_head else main(total, 3, heads, head_dim)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    bounds[1:-1] -= min(length, 1)
    longest = length + min(length, int(batch > 1))
    return {"qkv": qkv}, {"cu_seqlens": bounds, "max_seqlen": longest, "scale": 0.25}


def _regions(batch, length, device):
    """Boxes of two levels, some over the maps' ends; the last slot of an image is empty. The interpreter is slow."""
    slots = min(length, 8) if dispatch.interpreting() else length
    corners = quantized(batch, slots, 2, seed=5, mean=12.0, std=10.0)
    boxes = torch.cat([corners, corners + quantized(batch, slots, 2, seed=6, mean=7.0, std=6.0).abs()], dim=-1)
    valid = (torch.arange(slots) < max(slots - 1, 1)).repeat(batch, 1)
    others = {"boxes": boxes.to(device), "valid": valid.to(device), "size": 2, "scales": (0.25, 0.125)}
    return others | {"canonical_size": 4, "canonical_level": 2}


def _boxes(batch, length, channels, device):
    """``length`` candidates and at most 32 slots for boxes in each of ``batch`` images; ``channels`` if less."""
    slots = min(channels, 32)
    corners, sides = (quantized(batch, slots + length, 2, seed=i, mean=9.0, std=5.0) for i in (0, 1))
    boxes = torch.cat([corners, corners + sides.abs()], dim=-1)
    arguments = {
        "boxes": boxes[:, :slots].contiguous(),
        "counts": slots - torch.arange(batch) % (slots + 1),
        "candidates": boxes[:, slots:].contiguous(),
        "outside": torch.rand(batch, length, generator=torch.Generator().manual_seed(2)) < 0.1,
    }
    bands = {"thresholds": (0.3, 0.7), "labels": (0, -1, 1), "low_quality": True}
    return {name: tensor.to(device) for name, tensor in arguments.items()} | bands


def _overlapping(batch, length, device):
    """``batch`` problems of ``length`` boxes around a few places; scratch grows with the square of the length."""
    rows = min(length, 100 if dispatch.interpreting() else 2000)
    corners = quantized(batch, rows, 2, std=4.0)
    boxes = torch.cat([corners, corners + 12 + quantized(batch, rows, 2, seed=1, std=2.0)], dim=-1)
    valid = (torch.arange(rows) % 5 != 1).repeat(batch, 1)
    return {"boxes": boxes.to(device), "valid": valid.to(device), "iou_threshold": 0.6}


def _polygons(batch, length, channels, device):
    """Polygons with ``length`` points in each of ``batch`` instances, and one more that has none; bitmaps of at most
    ``channels`` pixels a side."""
    points = quantized(batch * length, 2, dtype=torch.float64, mean=8.0, std=4.0)
    # Two polygons an instance, the first of three points if there are so many.
    polygon_starts = [i * length + part for i in range(batch) for part in (0, min(length, 3))] + [batch * length]
    instance_starts = [*range(0, 2 * batch + 1, 2), 2 * batch]
    boxes = quantized(2 * batch + (3 if batch else 0), 4, seed=1, mean=6.0, std=2.0)
    boxes[:, 2:] += boxes[:, :2]
    arguments = {
        "points": points,
        "polygon_starts": torch.tensor(polygon_starts, dtype=torch.int32),
        "instance_starts": torch.tensor(instance_starts, dtype=torch.int32),
        "index": torch.arange(len(boxes)) % (batch + 1),
        "boxes": boxes,
    }
    return {name: tensor.to(device) for name, tensor in arguments.items()} | {"size": max(1, min(channels, 28))}


def _laid_out(arguments, layout):
    is_float = {k: isinstance(v, torch.Tensor) and v.is_floating_point() for k, v in arguments.items()}
    return {k: lay_out(v, layout) if is_float[k] else v for k, v in arguments.items()}


def quantized(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.0, std: float = 1.0
) -> torch.Tensor:
    """Random numbers rounded to ``dtype``, so that float64 holds them exactly."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean).to(dtype)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in five layouts, by name: dense, channels last (4-D), transposed, sliced, with an offset."""
    variants = {"contiguous": x.contiguous()}
    if x.ndim == 4:
        variants["channels_last"] = x.contiguous(memory_format=torch.channels_last)
    if x.ndim > 1:
        variants["transposed"] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    variants["sliced"] = wide[..., ::2]
    variants["offset"] = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return variants


def lay_out(x: torch.Tensor, layout: str | None) -> torch.Tensor:
    """``x`` in a layout of ``LAYOUTS``; "expanded" repeats its first sample; unchanged for None."""
    if layout is None:
        return x
    return x[:1].expand(x.shape) if layout == "expanded" else layouts(x)[layout]


def _sizes(batch, sides):
    """(batch, 2): rows and columns of each image, one less of each for every image."""
    return torch.tensor([[max(1, side - i) for side in sides] for i in range(batch)], dtype=torch.int32).view(-1, 2)


def _sides(length):
    height = next((n for n in (4, 3, 2) if length % n == 0), 1)
    return height, length // height


def differentiate(
    example: Case,
    impl: str | None,
    upstream: Upstream | None = None,
    function: Callable | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of all of ``example.inputs``, by name.

    Args:
        example: a ``Case``.
        impl: implementation.
        upstream: makes the outputs' gradients from the outputs; by default ``cotangents``.
        function: called with the inputs alone in place of the case itself, a compiled one for example.
    """
    inputs = {k: v.detach().requires_grad_() for k, v in example.inputs.items()}
    outputs = (function or example)(**({} if function else {"impl": impl}), **inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    tensors = named(outputs)
    if inputs:
        grads = torch.autograd.grad(outputs, list(inputs.values()), (upstream or cotangents)(outputs))
        tensors |= {f"grad_{k}": g for k, g in zip(inputs, grads, strict=True)}
    return tensors


def named(outputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Outputs under the names of ``differentiate``."""
    return {f"output{i}": o.detach() for i, o in enumerate(outputs)}


def cotangents(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fixed gradients like ``outputs``, in their memory format."""
    return [
        torch.empty_like(o).copy_(quantized(*o.shape, dtype=BF16, seed=7 + i, mean=0.3)) for i, o in enumerate(outputs)
    ]


def errors(example: Case, actual: Mapping[str, torch.Tensor], upstream: Upstream | None = None) -> list[Measurement]:
    """How far ``actual`` is from the exact result, and how far it may be.

    Args:
        example: a ``Case``.
        actual: outputs and gradients under the names of ``differentiate``, or some of them.
        upstream: as in ``differentiate``.

    Raises:
        AssertionError: a shape or dtype is wrong, or a number is not finite; names the tensor.
    """
    cpu = example.on_cpu()
    same = differentiate(cpu, None, upstream, cpu.plain)
    exact = same
    if example.inputs:
        double = example.on_cpu(torch.float64)
        exact = differentiate(double, None, upstream, double.plain)
    main = next(iter(example.inputs.values()), None)
    results = []
    for name, value in actual.items():
        assert_same_kind(value, same[name], exact[name], name)
        summed = name in ("grad_weight", "grad_bias", "grad_pos")
        # The gradients of attention are sums over a sequence, those of maps over boxes.
        terms = main.numel() // value.shape[-1] if summed else example.others.get("max_seqlen", 1)
        if example.op == "roi_align_levels" and name.startswith("grad_"):
            terms = example.others["boxes"].shape[1]
        results.append(measure(value, same[name], exact[name], max(terms, 1), name))
    return results


def judge(example: Case, actual: Mapping[str, torch.Tensor], upstream: Upstream | None = None) -> list[Measurement]:
    """``errors``, which must be within their budgets.

    Raises:
        AssertionError: also if one is not; names the tensor.
    """
    results = errors(example, actual, upstream)
    for result in results:
        result.check(example.id)
    return results
