"""What all operations have in common, in every implementation, dtype, layout and size of ``mimdet.testing.cases``."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernel_cases import assert_same_bits, changed, check, on_runners, tensors_of
from support.kernels import BF16, F16, F32, INTERPRETED, here, native, needs_compiler, usable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from mimdet.kernels import OPS, KernelUnavailableError
from mimdet.parity.cases import in_level
from mimdet.testing.op_cases import (
    DIFFERENTIABLE,
    DISCRETE,
    DTYPES,
    IMAGES,
    MAPS,
    NORMS,
    OPTIONAL,
    PADDED,
    SIZES,
    case,
    cases,
    cotangents,
    differentiate,
    dtypes_of,
    judge,
    lay_out,
)

# One rounding: the same bits as plain PyTorch, but for sums over images.
EXACT = ("gather_add_pos", "scatter_fill")
VARIANTS = [(op, "small") for op in OPS] + [(op, "padded") for op in PADDED] + [(op, "bare") for op in OPTIONAL]


@on_runners(eager=True)
@pytest.mark.parametrize("dtype", DTYPES)
def test_budget(op, impl, device, dtype):
    if dtype not in dtypes_of(op) or not usable(op, impl, device, DTYPES[dtype]):
        pytest.skip("no such dtype")
    for example in cases(op, dtype, device=device):
        layout, size = example.id.split("-")[2:]
        if in_level("default", INTERPRETED, dtype, layout, size) and (size != "model" or dtype == "fp32"):
            actual = check(example, impl)
            if op in EXACT:
                cpu = example.on_cpu()
                same = differentiate(cpu, None, function=cpu.plain)
                exact = [name for name in actual if name != "grad_pos"]
                assert_same_bits({k: actual[k].cpu() for k in exact}, {k: same[k] for k in exact})


@on_runners()
@pytest.mark.parametrize("tile", here([16, 32, 256], [32]))
def test_partial_tile(op, impl, device, tile):
    """Memory past the last element is NaN, 0 x NaN is NaN, and nothing is written there [NATTEN #341]."""
    for size in here((tile - 1, tile, tile + 1), (tile - 1, tile + 1)):
        for sizes in ({"channels": size}, {"length": size, "channels": 8}):
            check(case(op, **sizes, device=device), impl)


# A polygon has more than one point, attention more than one channel.
@on_runners([op for op in OPS if op not in ("attention_varlen", "rasterize_polygons")])
@pytest.mark.parametrize("sizes", [{"length": 1}, {"length": 9, "channels": 1}], ids=["one-row", "one-channel"])
def test_smallest(op, impl, device, sizes):
    check(case(op, **sizes, device=device), impl)


@on_runners(EXACT, eager=True)
def test_positions_with_a_leading_one(op, impl, device):
    example = case(op, device=device)
    assert torch.equal(example(impl, pos=example.inputs["pos"][None]), example(impl))


@on_runners(EXACT, eager=True)
def test_autocast_keeps_the_sum_in_float32(op, impl, device):
    example, linear = case(op, device=device), torch.nn.Linear(24, 24).to(device)
    with torch.autocast(device, dtype=BF16):
        rows = {name: linear(value) for name, value in example.inputs.items() if name != "pos"}
        out = example(impl, **rows)
        assert torch.equal(out.cpu(), example.on_cpu().plain(**{name: row.cpu() for name, row in rows.items()}))
    assert {row.dtype for row in rows.values()} == {BF16}
    assert out.dtype == F32
    out.sum().backward()
    assert linear.weight.grad.isfinite().all()


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("channels", [768, 512, 17])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, None)], ids=str)
@pytest.mark.parametrize(("op", "registers"), [("gather_add_pos", 64), ("scatter_fill", 80)])
def test_compiles_within_the_budget(op, registers, dtypes, channels, capability):
    from support.aot import compile_pair

    dtype, of_pos = dtypes
    if of_pos is None and op not in OPTIONAL:
        pytest.skip("always has positions")
    example = case(op, length=4200, channels=channels, dtype=dtype, parameters=of_pos or F32, bare=of_pos is None)
    for one in compile_pair(op, capability, lambda: differentiate(example, "triton")):
        assert one.stack == 0, one
        assert one.registers <= registers, one
        assert channels % 16 or (one.loads_16 and one.stores_16), one


# No kernel takes bfloat16 weights of float32 maps.
MIXED = ("add_layer_norm", "bias_gelu", *EXACT)


@on_runners((*MIXED, *IMAGES), eager=True)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_parameters_in_bfloat16(op, impl, device, dtype):
    if dtype == F32 and op in IMAGES:
        pytest.skip("weights are as wide as maps, or wider")
    check(case(op, dtype=dtype, parameters=BF16, device=device), impl)


@on_runners(here(OPS, DISCRETE), eager=True)
def test_only_the_required_gradients(op, impl, device):
    """An input without one changes no other's; boxes, points and noise have none."""
    example = case(op, device=device)
    if op in DISCRETE:
        for tensor in tensors_of(example).values():
            tensor.requires_grad_(tensor.is_floating_point())
        outputs = example(impl)
        assert not any(t.requires_grad for t in (outputs if isinstance(outputs, tuple) else [outputs]))
        return
    expected = differentiate(example, impl)
    for name, value in example.inputs.items():
        leaf = value.clone().requires_grad_()
        outputs = example(impl, **{name: leaf})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
        torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
        torch.testing.assert_close(leaf.grad, expected[f"grad_{name}"], msg=name)


@on_runners(
    [op for op in OPS if op not in ("attention_varlen", "bias_gelu", "add_layer_norm", *here((), IMAGES))], True
)
def test_integers_and_masks_of_any_width_and_strides(op, impl, device):
    example = case(op, padded=op in PADDED, device=device)
    others = {k: v for k, v in tensors_of(example).items() if not v.is_floating_point()}
    expected = differentiate(example, impl)
    for dtype, layout in ((torch.int32, "sliced"), (torch.int64, "transposed")):
        laid_out = {k: v if v.dtype == torch.bool else v.to(dtype) for k, v in others.items()}
        laid_out = {k: lay_out(v, layout if v.dim() > 1 else "sliced") for k, v in laid_out.items()}
        assert_same_bits(expected, differentiate(changed(example, **laid_out), impl))


@native
@pytest.mark.parametrize("dtype", [F16, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "size"), [row for row in VARIANTS if row[0] in DIFFERENTIABLE])
def test_dtypes_without_a_kernel_run_eager(op, size, dtype):
    """float64 has PyTorch's own gradients to a few ulps."""
    example = case(op, dtype=dtype, parameters=torch.promote_types(dtype, F32), **SIZES[size])
    judge(example, differentiate(example, "auto"))
    if not usable(op, "aten_cpu", "cpu", dtype):
        with pytest.raises(KernelUnavailableError, match=rf"{op}: \w+ cannot run: no kernel for {dtype}"):
            example("cpp")


@native
@on_runners(DIFFERENTIABLE)
def test_recomputed(op, impl, device):
    example = case(op, device=device)
    again = differentiate(example, None, function=lambda **kw: checkpoint(example, impl, use_reentrant=False, **kw))
    assert_same_bits(differentiate(example, impl), again)


@native
@on_runners(MAPS)
def test_sizes_of_everything_change_nothing(op, impl, device):
    example = case(op, device=device)
    maps = list(example.inputs.values())[: 2 if op == "roi_align_levels" else 1]
    sizes = torch.tensor([[m.shape[2:]] * len(m) for m in maps], device=device)
    sizes = sizes if op == "roi_align_levels" else sizes[0]
    judge(example, differentiate(example._replace(others=example.others | {"sizes": sizes}), impl))


@on_runners(IMAGES, eager=True)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("padded", [False, True])
def test_maps_of_several_tasks(op, impl, device, padded, layout, dtype):
    """Bounds of tasks cut rows. NaN around the images of maps and of their gradients leaks nowhere."""
    length, channels = here((720, 96), (240, 40))
    example = case(op, length=length, channels=channels, dtype=dtype, layout=layout, padded=padded, device=device)
    x = example.inputs["x"]
    padding = x.isnan()

    def upstream(outputs):
        return [g.masked_fill(padding.to(g.device), torch.nan) for g in cotangents(outputs)]

    actual = check(example, impl, upstream)
    assert padding.any() == padded
    for tensor in (actual["output0"], actual["grad_x"]):
        assert not tensor[padding].any()
        assert tensor.stride() == x.stride() or impl == "eager"


@pytest.mark.parametrize("bad", [[[4, 5], [5, 5]], [[4, -1], [4, 5]], [[4, 5], [4, 6]]], ids=str)
@pytest.mark.parametrize("op", IMAGES)
@native
def test_sizes_outside_of_the_map(op, bad, monkeypatch):
    example = case(op, length=20)
    assert example.inputs["x"].shape[2:] == (4, 5)
    example.others["sizes"] = torch.tensor(bad)
    if usable(op, "cpp", "cpu"):
        with pytest.raises(RuntimeError, match="sizes"):
            example("cpp")
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    with pytest.raises(ValueError, match=f"{op}: sizes"):
        example("eager")


@on_runners(("add_layer_norm", "bias_gelu"))
@pytest.mark.parametrize("rows", here([16, 65, 6153], [5, 6, 7, 13]))
def test_partial_sums_share_out_rows_unevenly(op, impl, device, rows, monkeypatch):
    partials = importlib.import_module(f"mimdet.kernels.{op}.ops")._PARTIALS
    monkeypatch.setitem(partials, "triton", (1, 3))
    check(case(op, 1, rows, 8, device=device), impl)


class Calls(TorchDispatchMode):
    """Records the calls of mimdet's registered operations."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mimdet":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@native
@on_runners()
@pytest.mark.parametrize("size", ["small", "padded", "bare"])
def test_opcheck(op, impl, device, size):
    """Schema, shapes of fake tensors, autograd and compilation; an output that is an input breaks the last two
    [pytorch #134278]."""
    if (op, size) not in VARIANTS:
        pytest.skip("has no such arguments")
    layout = "channels_last" if op in IMAGES and size == "padded" else None
    with Calls() as calls:
        differentiate(case(op, layout=layout, device=device, **SIZES[size]), impl)
    assert len(calls.calls) == (5 if op == "batch_norm" else 2 if op in DIFFERENTIABLE else 1)
    for function, args in calls.calls:
        args = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        if function.name() == f"mimdet::{op}" and op in DIFFERENTIABLE:
            args = tree_map_only(torch.Tensor, lambda a: a.requires_grad_(a.dtype.is_floating_point), args)
        torch.library.opcheck(function, args)


def wrong_numbers(value):
    """Names and tensors that differ from a right one."""
    flat = value.flatten().clone()
    place = flat.float().abs().argmax()
    flat[place] = ~flat[place] if value.dtype == torch.bool else 0 if flat[place] else 1
    yield "one element", flat.view(value.shape)
    if value.is_floating_point():
        yield "not finite", flat.index_fill(0, place, torch.nan).view(value.shape)
        if not torch.equal(value, value.bfloat16()):
            yield "in bfloat16", value.bfloat16().to(value.dtype)
        yield "scaled", value * (1 + 1e-4)
        yield "shape", value[..., :-1]
        yield "dtype", value.double()


def fails(example, actual):
    """Whether the comparison finds a mistake."""
    try:
        judge(example, actual)
    except AssertionError:
        return True
    return False


@native
@pytest.mark.parametrize("op", OPS)
def test_wrong_results_are_caught(op):
    """The comparison itself: each of these must fail it."""
    example = case(op)
    right = differentiate(example, "eager")
    assert not fails(example, right)
    wrong = {(name, kind): {**right, name: t} for name, value in right.items() for kind, t in wrong_numbers(value)}
    assert not [what for what, actual in wrong.items() if not fails(example, actual)]


# Numbers do not depend on these, or another one is refused.
STARTS = ("cu_seqlens", "polygon_starts", "instance_starts")
NO_NUMBERS = (*STARTS, "training", "max_seqlen", "size", "scales", "thresholds", "labels")


def wrong(value):
    """Another value of the same type."""
    if isinstance(value, torch.Tensor):
        fewer = not value.is_floating_point() and value.dim() == 1
        return ~value if value.dtype == torch.bool else value // 2 if fewer else value.roll(1, 0)
    return not value if isinstance(value, bool) else 1.5 * value + (value == 0)


@native
@pytest.mark.parametrize("op", OPS)
def test_wrong_arguments_are_caught(op):
    """Kernels that take another number for an argument: epsilon, scale, mask, weight, index and so on."""
    example = case(op, length=12, std=1e-3 if op in NORMS else 1.0, padded=op in PADDED)
    arguments = {k: v for k, v in (example.inputs | example.others).items() if k not in NO_NUMBERS}
    others = {name: changed(example, **{name: wrong(value)}) for name, value in arguments.items()}
    results = {name: differentiate(other, None, function=other.plain) for name, other in others.items()}
    assert not [name for name, actual in results.items() if not fails(example, actual)]


@native
@pytest.mark.skipif("MIMDET_CPU_ISA" in os.environ, reason="already asked for")
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors(isa):
    """Fewer lanes mean longer sums, and other tails."""
    folder = Path(__file__).parent
    names = ("operations", "failure_modes", "batch_norm", "match_boxes", "nms_slots")
    selected = "budget or partial_tile or cancellation or several or rounded or at_the_threshold"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [*(str(folder / f"test_{name}.py") for name in names), "-k", f"cpp and ({selected})"]
    done = subprocess.run(command, env={**os.environ, "MIMDET_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
