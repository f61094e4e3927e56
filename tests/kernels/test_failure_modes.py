"""Known failures of fused kernels, each tested on every operation that it concerns; its source is in brackets.

All implementations that run here are tested: C++ on a CPU, Triton and CUDA C++ on a GPU, Triton's interpreter. See also
test_operations.py and test_build.py, and for 4 GiB of addresses test_gather_add_pos.py, test_scatter_fill.py and
test_attention_varlen.py.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from support.kernel_cases import assert_same_bits, on_runners, triton_launches
from support.kernels import BF16, INTERPRETED, native, needs_compiler, quantized

from mimdet import kernels
from mimdet.kernels import OPS
from mimdet.testing.op_cases import (
    DIFFERENTIABLE,
    IMAGES,
    MAPS,
    MIXING,
    NORMS,
    PACKED,
    case,
    cotangents,
    differentiate,
    judge,
    lay_out,
    public,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.usefixtures("poisoned")

# Ranks of the main input; (3,) for all others.
RANKS = {
    "add_layer_norm": (2, 3, 4),
    "attention_varlen": (4,),
    "bias_gelu": (2, 3, 4),
    "nms_slots": (3,),
    "rasterize_polygons": (2,),
    "sample_tokens": (2,),
} | dict.fromkeys((*IMAGES, "roi_align_levels"), (4,))


@on_runners()
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_rank(op, impl, device, rank):
    """A backward that assumes a rank reads out of bounds [Liger #1375]: correct, or a named error."""
    example = case(op, device=device)
    shape = {2: (2, 24), 3: (2, 6, 24), 4: (2, 2, 3, 24)}[rank]
    if op not in DIFFERENTIABLE:
        main = {"match_boxes": "boxes", "nms_slots": "boxes", "sample_tokens": "noise"}.get(op, "points")
        tensor = torch.rand(shape, dtype=example.others[main].dtype, device=device)
        example = example._replace(others=example.others | {main: tensor})
    else:
        # Tensors of the main input's shape change their rank.
        main = next(iter(example.inputs.values())).shape
        for name, value in example.inputs.items():
            if value.shape == main:
                example.inputs[name] = quantized(*shape).to(device) if len(main) != rank else value
    if rank in RANKS.get(op, (3,)):
        if op in DIFFERENTIABLE:
            judge(example, differentiate(example, impl))
    else:
        with pytest.raises(ValueError, match=f"{op}: .* must (both )?be "):
            example(impl)


LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")


@on_runners(DIFFERENTIABLE)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
def test_strides(op, impl, device, of_gradient):
    """Strided or expanded inputs and gradients are misread [quack #88]."""

    def upstream(outputs):
        return [lay_out(g, of_gradient) for g in cotangents(outputs)]

    # The same layout, and the one before it.
    for of_input in (of_gradient, LAYOUTS[LAYOUTS.index(of_gradient) - 1]):
        example = case(op, layout=of_input, device=device)
        judge(example, differentiate(example, impl, upstream), upstream)


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_int64_addresses(op):
    """32-bit offsets corrupt silently past 2**31 [fla #1080]: no address comes from a 32-bit product that may wrap."""
    from support.aot import compile_for

    for launch in triton_launches(op):
        compile_for(90, launch.kernel, *launch.arguments, grid=launch.grid, **launch.constants)


@needs_compiler
@pytest.mark.parametrize("kernel", ["program_times_block", "widened_too_late", "row_times_stride", "wide"])
def test_int64_addresses_are_checked(kernel):
    from support import kernels_with_narrow_addresses as narrow_kernels
    from support.aot import compile_for

    expected = contextlib.nullcontext() if kernel == "wide" else pytest.raises(AssertionError, match="32-bit products")
    with expected:
        compile_for(90, getattr(narrow_kernels, kernel), torch.empty(4), 96, block=128)


@on_runners([op for op in DIFFERENTIABLE if op not in (*PACKED, *MIXING)])
@pytest.mark.parametrize("many", [False, True], ids=["small", "more-than-two-to-the-31"])
def test_int64_last_image(op, impl, device, many):
    """The last of many images, 2**31 elements later too, equals the image alone. PACKED have their own tests."""
    if many and (device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30):
        pytest.skip("needs a GPU of 80 GB")
    count, length, channels = (513, 4096, 1024) if many else (3, 6, 24)
    last = case(op, 1, length, channels, dtype=BF16, parameters=BF16, device=device)

    def after_zeros(tensor):
        padded = tensor.new_zeros(count * len(tensor), *tensor.shape[1:])
        padded[-len(tensor) :] = tensor
        return padded

    def of_images(values, repeat):
        return {k: repeat(v) if isinstance(v, torch.Tensor) and len(v) == 1 else v for k, v in values.items()}

    others = of_images(last.others, lambda v: v.repeat(count, *[1] * (v.dim() - 1)))
    all_of_them = last._replace(inputs=of_images(last.inputs, after_zeros), others=others)
    expected = differentiate(last, impl)

    def upstream(outputs):
        return [after_zeros(g) for g in cotangents([o[-(len(o) // count) :] for o in outputs])]

    actual = differentiate(all_of_them, impl, upstream)
    for name in expected:
        if name.removeprefix("grad_") not in ("weight", "bias", "pos"):
            assert torch.equal(actual[name][-len(expected[name]) :], expected[name]), name


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_tuned_at_run_time(op):
    assert "autotune" not in (Path(kernels.__file__).parent / op / "triton.py").read_text()


@native
@on_runners()
def test_compiled_output(op, impl, device):
    """Compiled results silently differ; Python scalars become float64 [Liger #871]."""
    torch._dynamo.reset()
    run, example = public(op), case(op, device=device)
    scalars = {k: v for k, v in example.others.items() if isinstance(v, float)}
    tensors = {k: v for k, v in example.others.items() if k not in scalars}

    def function(inputs, tensors, scalars):
        return run(**inputs, **tensors, **scalars, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    # The second value of a scalar becomes a SymFloat.
    for factor in (1.0, 0.5):
        values = {k: v * factor for k, v in scalars.items()}
        expected, actual = (
            differentiate(example, impl, function=lambda f=f, values=values, **inputs: f(inputs, tensors, values))
            for f in (function, compiled)
        )
        assert_same_bits(expected, actual)
        assert {k: v.dtype for k, v in expected.items()} == {k: v.dtype for k, v in actual.items()}


@native
@on_runners()
def test_graph_breaks(op, impl, device):
    """Reading values from the device breaks graphs [pytorch #128061]: one graph, for all sizes."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(public(op), fullgraph=True, dynamic=True, backend=counter)
    # Sizes of the first call differ: dynamo would give equal ones the same symbol.
    for batch, length in ((13, 15), (6, 28), (5, 27)):
        example = case(op, batch=batch, length=length, device=device)
        compiled(**example.inputs, **example.others, impl=impl)
    assert counter.frame_count == 1


@needs_gpu
@on_runners()
def test_cuda_graph(op, impl, device):
    """Tuning, or a wait, inside a capture [triton #10596]: warm, capture, replay on other numbers, compare."""
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    example, other = case(op, device=device), case(op, mean=-1.0, std=2.0, device=device)
    expected = differentiate(other, impl)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            differentiate(example, impl)
    torch.cuda.current_stream().wait_stream(side)
    gradients = cotangents([v for k, v in expected.items() if k.startswith("output")])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = differentiate(example, impl, lambda _: gradients)
    for name, value in other.inputs.items():
        example.inputs[name].copy_(value)
    graph.replay()
    assert_same_bits(expected, actual)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@on_runners()
def test_wrong_gpu(op, impl, device):
    """A launch on the current GPU instead of the tensors' [triton #5205]."""
    if device == "cpu":
        pytest.skip("no GPU's")
    assert torch.cuda.current_device() == 0
    first, second = (differentiate(case(op, device=f"cuda:{i}"), impl) for i in (0, 1))
    assert {v.device.index for v in second.values()} == {1}
    assert_same_bits({k: v.cpu() for k, v in first.items()}, {k: v.cpu() for k, v in second.items()})


@on_runners(NORMS)
def test_cancellation(op, impl, device):
    """E[x^2] - E[x]^2 far from zero is noise [pytorch #54293]."""
    of_tokens = op in ("add_layer_norm", "layer_norm_gelu")
    sizes = {"channels": 4096} if of_tokens else {"batch": 1, "length": 2048, "channels": 24}
    example = case(op, mean=1e3, std=0.1, **sizes, device=device)
    if op == "add_layer_norm":
        example.inputs["x"] = example.inputs["x"] - 1e3
    judge(example, differentiate(example, impl))


@on_runners(DIFFERENTIABLE)
def test_mixed_dtypes(op, impl, device):
    """float32 parameters beside bfloat16 activations under autocast, forward and backward [mamba #868]."""
    example = case(op, dtype=BF16, device=device)
    with torch.autocast(device, dtype=BF16):
        actual = differentiate(example, impl)
    judge(example, actual)
    assert {k: actual[f"grad_{k}"].dtype for k in example.inputs} == {k: v.dtype for k, v in example.inputs.items()}


@on_runners()
@pytest.mark.parametrize("padded", [False, True])
def test_determinism(op, impl, device, padded):
    """Atomics make sums differ from run to run [mamba #493], tuning that mutates outputs the first call from the second
    [triton #6547, #9230], and so does memory that is not written: new memory is NaN."""
    if padded and (op not in MAPS or INTERPRETED):
        pytest.skip("slow, or has no maps")
    # So many that threads share them.
    batch = {"nms_slots": 9, "sample_tokens": 16}.get(op, 2)
    example = case(op, batch, length=30 if INTERPRETED else 600, channels=64, padded=padded, device=device)
    threads, runs = torch.get_num_threads(), []
    torch.use_deterministic_algorithms(True)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(differentiate(example, impl))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert_same_bits(runs[0], run)


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_grid(op):
    """A grid has at most 65535 programs along y and z [fla #172]."""
    for sizes in ({"batch": 70_000, "length": 2, "channels": 4}, {"batch": 1, "length": 140_000, "channels": 4}):
        for launch in triton_launches(op, **sizes):
            x, *rest = launch.grid
            assert 0 < x < 2**31, launch
            assert all(0 < n < 2**16 for n in rest), launch


@on_runners()
@pytest.mark.parametrize("empty", ["batch", "length", "channels", "kept"])
def test_empty(op, impl, device, empty):
    """Empty input [fla #172]: no images, no tokens, no token kept."""
    rows = "gather_add_pos", "scatter_fill"
    if empty == "channels" and op not in (*rows, "roi_align_levels"):
        pytest.skip("has channels")
    if empty == "kept":
        if op not in rows:
            pytest.skip("keeps nothing")
        example = case(op, length=1, device=device)
        assert (example.others.get("index", example.inputs.get("kept"))).shape[1] == 0
    else:
        example = case(op, **{empty: 0}, device=device)
    actual = differentiate(example, impl)
    if empty == "kept":
        judge(example, actual)
        return
    for name, value in actual.items():
        assert not value.any(), name
        if name.startswith("grad_"):
            assert value.shape == example.inputs[name.removeprefix("grad_")].shape


FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@on_runners(IMAGES)
@pytest.mark.parametrize("of_gradient", FORMATS)
@pytest.mark.parametrize("of_input", FORMATS)
def test_channels_last(op, impl, device, of_input, of_gradient):
    """channels_last is lost, or read as if the gradient had the input's format [pytorch #111824]."""
    example = case(op, length=12, device=device)
    example.inputs["x"] = example.inputs["x"].contiguous(memory_format=FORMATS[of_input])

    def upstream(outputs):
        return [g.contiguous(memory_format=FORMATS[of_gradient]) for g in cotangents(outputs)]

    actual = differentiate(example, impl, upstream)
    judge(example, actual, upstream)
    assert actual["output0"].stride() == actual["grad_x"].stride() == example.inputs["x"].stride()


@native
@on_runners(("add_layer_norm",))
def test_recomputation(op, impl, device):
    """Recomputed blocks drop other samples [OLMo-core #828]."""
    from torch.utils.checkpoint import checkpoint

    from mimdet.modeling.vit import TransformerBlock, add

    block = TransformerBlock(24, 2, drop_path=0.5).to(device).train()
    x = quantized(8, 5, 24).to(device)

    def gradients(function):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        with kernels.use(impl):
            # A second block's draws follow the first's.
            for _ in range(2):
                hidden, residual, scale = function(leaf)
            add(hidden, residual, scale).square().sum().backward()
        return leaf.grad

    plain = gradients(block)
    assert torch.equal(gradients(lambda leaf: checkpoint(block, leaf, use_reentrant=False)), plain)
    torch.rand(3, device=device)
    assert not torch.equal(gradients(lambda leaf: block(leaf + 0 * torch.rand(1, device=device))), plain)


# Saved tensor of backward, if not the main input.
SAVED = {
    "add_layer_norm": "output",
    "attention_varlen": "qkv",
    "gather_add_pos": "index",
    "roi_align_levels": "boxes",
    "scatter_fill": "ids_restore",
}


@on_runners(DIFFERENTIABLE)
def test_write_after_forward(op, impl, device):
    """A write to a saved tensor gives wrong gradients [Liger #272]: backward must raise."""
    example = case(op, device=device)
    inputs = {k: v.requires_grad_() * 1 for k, v in example.inputs.items()}
    outputs = example(impl, **inputs)
    saved = SAVED.get(op, "x")
    written = outputs[0] if saved == "output" else inputs[saved] if saved in inputs else example.others[saved]
    last = outputs[-1] if isinstance(outputs, tuple) else outputs
    with torch.no_grad():
        written.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.sum().backward()
