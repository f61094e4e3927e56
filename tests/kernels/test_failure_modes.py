"""Failures that fused kernels are known for, each a test of every operation that it concerns.

Where each was seen is in brackets. What runs is what can run here: C++ on a CPU, Triton and CUDA C++ on a GPU,
and Triton's interpreter. Beside this file: wrong builds and wheels in test_build.py and test_packaging.py, 4 GiB of
addresses in test_gather_add_pos.py, test_scatter_fill.py and test_attention_varlen.py.
"""

import contextlib
from pathlib import Path

import pytest
import torch
from support.kernel_cases import (
    BF16,
    DIFFERENTIABLE,
    EPS,
    IMAGES,
    MIXING,
    NORMS,
    PACKED,
    assert_same_bits,
    case,
    cotangents,
    differentiate,
    judge,
    lay_out,
    on_runners,
    public,
    triton_launches,
)
from support.kernels import (
    INTERPRETED,
    Guarded,
    native,
    needs_compiler,
    poisoned_allocations,
    quantised,
    run_on_older_processor,
)
from torch.utils._python_dispatch import TorchDispatchMode

from mimdet import kernels
from mimdet.kernels import OPS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Ranks of the main input; (3,) for all others.
RANKS = {
    "add_layer_norm": (2, 3, 4),
    "attention_varlen": (4,),
    "bias_gelu": (2, 3, 4),
    "sample_tokens": (2,),
} | dict.fromkeys(IMAGES, (4,))


@on_runners()
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_rank(op, impl, device, rank):
    """A backward that assumes a rank reads out of bounds [Liger #1375]: right, or refused by name."""
    made = case(op, device=device)
    shape = {2: (2, 24), 3: (2, 6, 24), 4: (2, 2, 3, 24)}[rank]
    if op == "sample_tokens":
        made = made._replace(others=made.others | {"noise": torch.rand(shape).to(device)})
    else:
        # All that has the main input's shape changes its rank.
        main = next(iter(made.inputs.values())).shape
        for name, value in made.inputs.items():
            if value.shape == main:
                made.inputs[name] = quantised(*shape).to(device) if len(main) != rank else value
    if rank in RANKS.get(op, (3,)):
        if op != "sample_tokens":
            judge(made, differentiate(made, impl))
    else:
        with pytest.raises(ValueError, match=f"{op}: .* must (both )?be "):
            made(impl)


@on_runners((*NORMS, "bias_gelu"))
@pytest.mark.parametrize("channels", [17, 1000] if INTERPRETED else [17, 96, 192, 384, 1000])
def test_padded_lanes(op, impl, device, channels):
    """Lanes past the last channel leak into the variance unless the mean is 0 [triton #9838]."""
    made = case(op, channels=channels, mean=3.0, device=device)
    judge(made, differentiate(made, impl))


LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "expanded")


@on_runners(DIFFERENTIABLE)
@pytest.mark.parametrize("of_input", LAYOUTS)
def test_strides(op, impl, device, of_input):
    """Strided or expanded inputs and gradients are misread [quack #88]."""
    made = case(op, layout=of_input, device=device)
    outputs = made(impl)
    dense = cotangents(list(outputs) if isinstance(outputs, tuple) else [outputs])
    for of_gradient in LAYOUTS:
        given = [lay_out(g, of_gradient) for g in dense]
        judge(made, differentiate(made, impl, given), given)


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_int64_addresses(op):
    """32-bit offsets corrupt silently past 2**31 [fla #1080]: no address comes from a 32-bit product that may wrap."""
    from support.aot import compile_for

    for launch in triton_launches(op):
        compile_for(90, launch.kernel, *launch.arguments, grid=launch.grid, **launch.constants)


@needs_compiler
@pytest.mark.parametrize("kernel", ["program_times_block", "widened_too_late", "row_times_stride", "wide"])
def test_int64_addresses_are_really_looked_at(kernel):
    from support import kernels_with_narrow_addresses as narrow_kernels
    from support.aot import compile_for

    expected = contextlib.nullcontext() if kernel == "wide" else pytest.raises(AssertionError, match="32-bit products")
    with expected:
        compile_for(90, getattr(narrow_kernels, kernel), torch.empty(4), 96, block=128)


@on_runners(("gather_add_pos", "scatter_fill"))
def test_int64_and_int32_indices(op, impl, device):
    made = case(op, device=device)
    narrow = made._replace(others={k: v.int() for k, v in made.others.items()})
    assert_same_bits(differentiate(made, impl), differentiate(narrow, impl))


@on_runners([op for op in DIFFERENTIABLE if op not in (*PACKED, *MIXING)])
@pytest.mark.parametrize("many", [False, True], ids=["small", "more-than-two-to-the-31"])
def test_int64_last_image(op, impl, device, many):
    """The last of many images gives the same alone, 2**31 elements later too. Of PACKED: in their own tests."""
    if many and (device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30):
        pytest.skip("needs a GPU of 80 GB")
    count, length, channels = (513, 4096, 1024) if many else (3, 6, 24)
    last = case(op, 1, length, channels, dtype=BF16, parameters=BF16, device=device)

    def after_zeros(tensor):
        made = tensor.new_zeros(count, *tensor.shape[1:])
        made[-1:] = tensor
        return made

    def of_images(values, repeat):
        return {k: repeat(v) if isinstance(v, torch.Tensor) and len(v) == 1 else v for k, v in values.items()}

    others = of_images(last.others, lambda v: v.repeat(count, *[1] * (v.dim() - 1)))
    all_of_them = last._replace(inputs=of_images(last.inputs, after_zeros), others=others)
    outputs = last(impl)
    gradients = cotangents(list(outputs) if isinstance(outputs, tuple) else [outputs])
    want = differentiate(last, impl, gradients)
    got = differentiate(all_of_them, impl, [after_zeros(g) for g in gradients])
    for name in want:
        if name.removeprefix("grad_") not in ("weight", "bias", "pos"):
            assert torch.equal(got[name][-1:], want[name]), name


@on_runners()
def test_first_call(op, impl, device):
    """Tuning that mutates outputs hides partial writes [triton #6547, #9230]: the first call is the second, and all
    that was allocated (NaN here) is written."""
    made = case(op, length=30, channels=40, device=device)
    first, second = differentiate(made, impl), differentiate(made, impl)
    assert_same_bits(first, second)
    assert all(value.isfinite().all() for value in first.values())


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_tuned_at_run_time(op):
    assert "autotune" not in (Path(kernels.__file__).parent / op / "triton.py").read_text()


@native
@on_runners()
def test_compiled_output(op, impl, device):
    """Compiled results are silently others; Python scalars become float64 [Liger #871]."""
    torch._dynamo.reset()
    run, made = public(op), case(op, device=device)
    scalars = {k: v for k, v in made.others.items() if isinstance(v, float)}
    tensors = {k: v for k, v in made.others.items() if k not in scalars}

    def function(inputs, tensors, scalars):
        return run(**inputs, **tensors, **scalars, impl=impl)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    # The second value of a scalar makes it a symbol.
    for factor in (1.0, 0.5):
        given = {k: v * factor for k, v in scalars.items()}
        want, got = (
            differentiate(made, impl, function=lambda f=f, given=given, **inputs: f(inputs, tensors, given))
            for f in (function, compiled)
        )
        assert_same_bits(want, got)
        assert {k: v.dtype for k, v in want.items()} == {k: v.dtype for k, v in got.items()}


@native
@on_runners()
def test_graph_breaks(op, impl, device):
    """Values asked of the device while tracing break graphs [pytorch #128061]: one graph, for all sizes."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(public(op), fullgraph=True, dynamic=True, backend=counter)
    # No two sizes of the first call are equal: the tracer would take them for one.
    for batch, length in ((4, 15), (6, 28), (5, 27)):
        made = case(op, batch=batch, length=length, device=device)
        compiled(**made.inputs, **made.others, impl=impl)
    assert counter.frame_count == 1


@needs_gpu
@on_runners()
def test_cuda_graph(op, impl, device):
    """Tuning, or a wait, inside a capture [triton #10596]: warm, capture, replay on other numbers, compare."""
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    made, other = case(op, device=device), case(op, mean=-1.0, std=2.0, device=device)
    want = differentiate(other, impl)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            differentiate(made, impl)
    torch.cuda.current_stream().wait_stream(side)
    gradients = [g.to(device) for g in cotangents([v for k, v in want.items() if k.startswith("output")])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = differentiate(made, impl, gradients if made.inputs else None)
    for name, value in other.inputs.items():
        made.inputs[name].copy_(value)
    graph.replay()
    assert_same_bits(want, got)


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
    sizes = {"batch": 1, "length": 2048, "channels": 24} if op == "group_norm_gelu" else {"channels": 4096}
    made = case(op, mean=1e3, std=0.1, **sizes, device=device)
    if "branch" in made.inputs:
        made.inputs["branch"] = made.inputs["branch"] - 1e3
    judge(made, differentiate(made, impl))


@native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_older_processors(isa):
    """Fewer lanes mean longer sums, and other tails."""
    run_on_older_processor(isa, __file__, "cpp and (cancellation or strides or padded_lanes)")


@on_runners(DIFFERENTIABLE)
def test_mixed_dtypes(op, impl, device):
    """float32 parameters beside bfloat16 activations under autocast, forward and backward [mamba #868]."""
    made = case(op, dtype=BF16, device=device)
    with torch.autocast(device, dtype=BF16):
        got = differentiate(made, impl)
    judge(made, got)
    assert {k: got[f"grad_{k}"].dtype for k in made.inputs} == {k: v.dtype for k, v in made.inputs.items()}


@on_runners()
def test_determinism(op, impl, device):
    """Atomics make sums differ from run to run [mamba #493]."""
    made = case(op, length=30 if INTERPRETED else 600, channels=64, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for count in (1, 2, 3):
            with threads(count):
                runs.append(differentiate(made, impl))
    finally:
        torch.use_deterministic_algorithms(False)
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
@pytest.mark.parametrize("empty", ["batch", "length", "kept"])
def test_empty(op, impl, device, empty):
    """Nothing to do is done [fla #172]: no images, no tokens, no token kept."""
    if empty == "kept":
        if op not in ("gather_add_pos", "scatter_fill"):
            pytest.skip("keeps nothing")
        made = case(op, length=1, device=device)
        assert (made.others.get("index", made.inputs.get("kept"))).shape[1] == 0
    else:
        made = case(op, **{empty: 0}, device=device)
    got = differentiate(made, impl)
    if empty == "kept":
        judge(made, got)
        return
    for name, value in got.items():
        assert not value.any(), name
        if name.startswith("grad_"):
            assert value.shape == made.inputs[name.removeprefix("grad_")].shape


FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@on_runners(IMAGES)
@pytest.mark.parametrize("of_gradient", FORMATS)
@pytest.mark.parametrize("of_input", FORMATS)
def test_channels_last(op, impl, device, of_input, of_gradient):
    """channels_last is lost, or read as if the gradient had the input's format [pytorch #111824]."""
    made = case(op, length=12, device=device)
    made.inputs["x"] = made.inputs["x"].contiguous(memory_format=FORMATS[of_input])
    given = [g.contiguous(memory_format=FORMATS[of_gradient]) for g in cotangents([made.inputs["x"]])]
    got = differentiate(made, impl, given)
    judge(made, got, given)
    assert got["output0"].stride() == got["grad_x"].stride() == made.inputs["x"].stride()


@native
@on_runners()
@pytest.mark.parametrize("tile", [16, 32, 256])
def test_partial_tile(op, impl, device, tile):
    """Past the last element lies NaN, and 0 x NaN is NaN; nothing is written there [NATTEN #341]."""
    for size in (tile - 1, tile, tile + 1):
        for sizes in ({"channels": size}, {"length": size, "channels": 8}):
            made = case(op, **sizes, device=device)
            groups = made.inputs, {k: v for k, v in made.others.items() if isinstance(v, torch.Tensor)}
            guards = [{k: Guarded(v) for k, v in group.items()} for group in groups]
            inputs, others = ({k: g.tensor for k, g in group.items()} for group in guards)
            outputs = made(impl)
            gradients = cotangents(list(outputs) if isinstance(outputs, tuple) else [outputs]) if made.inputs else []
            of_outputs = [Guarded(g) for g in gradients]
            guarded = made._replace(inputs=inputs, others=made.others | others)
            got = differentiate(guarded, impl, [g.tensor for g in of_outputs])
            judge(made, got, gradients)
            for guard in [*guards[0].values(), *guards[1].values(), *of_outputs]:
                guard.check()


@native
@on_runners(("add_layer_norm",))
def test_recomputation(op, impl, device):
    """Recomputed blocks draw other samples to drop [OLMo-core #828]."""
    from torch.utils.checkpoint import checkpoint

    from mimdet.modeling.vit import TransformerBlock, add

    block = TransformerBlock(24, 2, drop_path=0.5).to(device).train()
    x = quantised(8, 5, 24).to(device)

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


# What backward reads, where that is not the main input.
SAVED = {
    "add_layer_norm": "output",
    "attention_varlen": "qkv",
    "gather_add_pos": "index",
    "scatter_fill": "ids_restore",
}


@on_runners(DIFFERENTIABLE)
def test_write_after_forward(op, impl, device):
    """Kernels that save what is written to later give wrong gradients [Liger #272]: backward raises."""
    made = case(op, device=device)
    inputs = {k: v.requires_grad_() * 1 for k, v in made.inputs.items()}
    outputs = made(impl, **inputs)
    saved = SAVED.get(op, "x")
    written = outputs[0] if saved == "output" else inputs[saved] if saved in inputs else made.others[saved]
    last = outputs[-1] if isinstance(outputs, tuple) else outputs
    with torch.no_grad():
        written.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.sum().backward()


class Calls(TorchDispatchMode):
    """Remembers the calls of mimdet's registered operations."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mimdet":
            self.made.append((function, args))
        return function(*args, **(kwargs or {}))


@native
@on_runners()
def test_alias(op, impl, device):
    """An output that is an input breaks autograd and compilation [pytorch #134278]: operations keep their schema."""
    made = case(op, length=8, device=device)
    with Calls() as calls:
        differentiate(made, impl)
    assert len(calls.made) == {"sample_tokens": 1, "batch_norm": 5}.get(op, 2)
    for function, args in calls.made:
        args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(function, args, test_utils=("test_schema", "test_faketensor"))


def test_every_operation_has_a_case():
    assert {case(op).op for op in OPS} == set(OPS)
    assert case("add_layer_norm").others["eps"] == EPS
