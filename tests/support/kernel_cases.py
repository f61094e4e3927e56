"""One case for every operation, at any size, dtype and layout, for tests of all of them."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from support.kernels import BF16, F32, INTERPRETED, PLACES, layouts, quantized, usable

from mimdet import kernels
from mimdet.kernels import OPS, dispatch
from mimdet.testing import assert_within_budget

EPS = 1e-6
# Operations by what they have in common.
IMAGES = ("batch_norm", "group_norm_gelu", "layer_norm_gelu")
NORMS = ("add_layer_norm", *IMAGES)
MIXING = ("batch_norm",)  # the result of an image depends on the others
PACKED = ("attention_varlen",)  # tokens of all images in one dimension
DISCRETE = ("match_boxes", "nms_slots", "rasterize_polygons", "sample_tokens")
DIFFERENTIABLE = tuple(op for op in OPS if op not in DISCRETE)


class Case(NamedTuple):
    """Arguments of an operation: float tensors that get gradients, the main one first, and all others."""

    op: str
    inputs: dict
    others: dict

    def __call__(self, impl=None, **inputs):
        return public(self.op)(**{**self.inputs, **inputs}, **self.others, impl=impl)

    def on_cpu(self, dtype=None):
        """The same on the CPU, ``inputs`` in ``dtype``."""
        others = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in self.others.items()}
        return self._replace(inputs={k: v.to("cpu", dtype) for k, v in self.inputs.items()}, others=others)


def public(op):
    """The public function; attention's is the one that the model calls, ROIAlign's takes its levels one by one."""
    if op == "roi_align_levels":
        return roi_align_levels
    return getattr(kernels, "attention_varlen_packed" if op == "attention_varlen" else op)


def roi_align_levels(fine, coarse, **arguments):
    """Of two levels: names for the tensors of a list."""
    return kernels.roi_align_levels([fine, coarse], **arguments)


def case(
    op, batch=2, length=6, channels=24, dtype=F32, parameters=F32, mean=0.5, std=1.0, layout=None, device="cpu"
):  # fmt: skip
    """Quantized random arguments of ``op``.

    Args:
        op: an operation.
        batch, length, channels: B, the number of tokens or positions, C. Images of ``PACKED`` have that many tokens
            on average.
        dtype: of the main inputs.
        parameters: dtype of weight, bias and position embedding.
        mean, std: of the main input.
        layout: name in ``support.kernels.layouts`` for the main inputs, or "expanded"; by default dense.
        device: of all tensors.
    """

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
        return Case(op, {"x": main(batch, channels, *_sides(length)), **affine}, others)
    if op == "match_boxes":
        return Case(op, {}, _boxes(batch, length, channels, device))
    if op == "nms_slots":
        return Case(op, {}, _overlapping(batch, length, device))
    if op == "rasterize_polygons":
        return Case(op, {}, _polygons(batch, length, channels, device))
    if op == "roi_align_levels":
        maps = {"fine": main(batch, channels, 8, 9), "coarse": main(batch, channels, 4, 5, seed=4)}
        return Case(op, maps, _regions(batch, length, device))
    if op == "sample_tokens":
        noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)).to(device)
        return Case(op, {}, {"noise": noise, "valid_mask": noise < 0.9, "ratio": 0.5})
    assert op == "scatter_fill", op
    inputs = {"kept": tokens(kept), "fill": tokens(length - kept, seed=4), "pos": pos}
    return Case(op, inputs, {"ids_restore": order})


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
    slots = min(length, 8) if INTERPRETED else length
    corners = quantized(batch, slots, 2, seed=5, mean=12.0, std=10.0)
    boxes = torch.cat([corners, corners + quantized(batch, slots, 2, seed=6, mean=7.0, std=6.0).abs()], dim=-1)
    valid = (torch.arange(slots) < max(slots - 1, 1)).repeat(batch, 1)
    others = {"boxes": boxes.to(device), "valid": valid.to(device), "size": 2, "scales": (0.25, 0.125)}
    return others | {"canonical_size": 8, "canonical_level": 2}


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
    rows = min(length, 100 if INTERPRETED else 2000)
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


def lay_out(x, layout):
    """``x`` in a layout of ``support.kernels.layouts``, or its first sample "expanded"; unchanged for None."""
    if layout is None:
        return x
    return x[:1].expand(x.shape) if layout == "expanded" else layouts(x)[layout]


def _sides(length):
    height = next((n for n in (4, 3, 2) if length % n == 0), 1)
    return height, length // height


def differentiate(example, impl, gradients=None, function=None):
    """Outputs, and gradients of all of ``example.inputs``, by name.

    Args:
        example: a ``Case``.
        impl: implementation.
        gradients: outputs' gradients; by default ``cotangents``.
        function: called with the inputs in place of the case itself, a compiled one for example.
    """
    inputs = {k: v.detach().requires_grad_() for k, v in example.inputs.items()}
    outputs = (function or example)(**({} if function else {"impl": impl}), **inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    tensors = {f"output{i}": o.detach() for i, o in enumerate(outputs)}
    if inputs:
        upstream = cotangents(outputs) if gradients is None else gradients
        grads = torch.autograd.grad(outputs, list(inputs.values()), upstream)
        tensors |= {f"grad_{k}": g for k, g in zip(inputs, grads, strict=True)}
    return tensors


def cotangents(outputs):
    """Fixed gradients like ``outputs``, in their memory format."""
    return [
        torch.empty_like(o).copy_(quantized(*o.shape, dtype=BF16, seed=7 + i, mean=0.3)) for i, o in enumerate(outputs)
    ]


def judge(example, actual, gradients=None):
    """``actual``, from ``differentiate``, within the error budget of plain PyTorch."""
    same = differentiate(example.on_cpu(), "eager", _on_cpu(gradients))
    exact = differentiate(example.on_cpu(torch.float64), "eager", _on_cpu(gradients, torch.float64))
    main = next(iter(example.inputs.values()), None)
    for name, value in actual.items():
        if not value.is_floating_point():
            assert torch.equal(value.cpu(), same[name]), name
            continue
        summed = name in ("grad_weight", "grad_bias", "grad_pos")
        # The gradients of attention are sums over a sequence, those of maps over boxes.
        terms = main.numel() // value.shape[-1] if summed else example.others.get("max_seqlen", 1)
        if example.op == "roi_align_levels" and name.startswith("grad_"):
            terms = example.others["boxes"].shape[1]
        assert_within_budget(value, same[name].to(value.dtype), exact[name], max(terms, 1), name)


def _on_cpu(gradients, dtype=None):
    return None if gradients is None else [g.to("cpu", dtype) for g in gradients]


def assert_same_bits(first, second):
    """Two results of ``differentiate`` are equal, NaN included."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def runners(ops=OPS):
    """pytest parameters (op, impl, device): all implementations of ``ops`` that run on this machine, except eager."""
    places = {**PLACES, "aten_cpu": "cpu"} if "cpp" in PLACES else PLACES
    parameters = [
        pytest.param(op, impl, device, id=f"{op}-{impl}")
        for op in ops
        for impl, device in places.items()
        if usable(op, impl, device)
    ]
    return parameters or [pytest.param(None, None, None, marks=pytest.mark.skip(reason="neither a compiler nor a GPU"))]


def on_runners(ops=OPS):
    """Decorator: the test runs for every one of ``runners``."""
    return pytest.mark.parametrize(("op", "impl", "device"), runners(ops))


def triton_launches(op, length=12, channels=48, **sizes):
    """Launches that ``op``'s Triton kernels would make, forward and backward; images in both memory formats."""
    from support.aot import launches

    with pretend("triton", op), launches() as recorded:
        for layout in (None, "channels_last") if op in IMAGES else (None,):
            differentiate(case(op, length=length, channels=channels, layout=layout, **sizes), "triton")
    assert recorded
    return recorded


@contextlib.contextmanager
def pretend(impl, *ops):
    """Inside, ``impl`` of ``ops`` supports every call."""
    with pytest.MonkeyPatch.context() as patch:
        for op in ops:
            implementations = dispatch.operations()[op].implementations
            patch.setitem(implementations, impl, implementations[impl]._replace(supports=lambda call: None))
        dispatch.forget()
        yield
    dispatch.forget()
