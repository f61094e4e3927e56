"""attention_varlen: softmax attention within each sequence of a packed batch."""

import sys
import types

import pytest
import torch
from support.kernel_cases import assert_same_bits, check
from support.kernels import BF16, F16, F32, INTERPRETED, here, layouts, native, needs_compiler, quantized, usable
from torch._subclasses import FakeTensorMode

from mimdet.kernels import KernelUnavailableError, attention_varlen, attention_varlen_packed, debug, dispatch, use
from mimdet.kernels.attention_varlen import flash_attn, ops, reference, torch_attention
from mimdet.testing import assert_within_budget
from mimdet.testing.op_cases import Case, differentiate

OP = "attention_varlen"
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
PLACES = {"aten_cpu": "cpu", "triton": "cuda", "flash_attn": "cuda", "torch_varlen": "cuda"}
OTHERS = ("flash_attn", "torch_varlen")  # 16-bit kernels only, head dims that are multiples of 8
# Around tile sizes, with empty sequences in the middle and at both ends.
LENGTHS = (0, 1, 2, 31, 32, 0, 33, 127, 128, 129, 0)


@pytest.fixture(params=here(PLACES, {"triton": "cpu"}).items(), ids=here(PLACES, ["triton"]))
def runner(request):
    impl, device = request.param
    if not usable(OP, impl, device, BF16):
        pytest.skip(f"{impl} cannot run here")
    return impl, device


def cumulated(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def sequences(lengths, heads=2, head_dim=32, dtype=BF16, std=1.0, scale=None, max_seqlen=None, device="cpu"):
    """A case of these lengths."""
    qkv = quantized(sum(lengths), 3, heads, head_dim, dtype=dtype, std=std).to(device)
    rest = {"max_seqlen": max(lengths, default=0) if max_seqlen is None else max_seqlen}
    rest["scale"] = head_dim**-0.5 if scale is None else scale
    return Case(OP, {"qkv": qkv}, {"cu_seqlens": cumulated(lengths).to(device), **rest})


def judge_each(example, actual, lengths):
    """Every sequence is within a budget of its own: outputs of long ones are small beside those of short ones."""
    cpu, double = example.on_cpu(), example.on_cpu(torch.float64)
    same, exact = (differentiate(one, None, function=one.plain) for one in (cpu, double))

    def parts(tensors):
        names = ("output0", "dq", "dk", "dv")
        return zip(names, (tensors["output0"].cpu(), *tensors["grad_qkv"].cpu().unbind(1)), strict=True)

    for (name, value), (_, plain), (_, expected) in zip(*map(parts, (actual, same, exact)), strict=True):
        for i, rows in enumerate(zip(*(t.split(lengths) for t in (value, plain, expected)), strict=True)):
            if lengths[i] > 1:  # the gradients of a sequence of one token are 0 but for rounding
                assert_within_budget(*rows, name=f"{name} of sequence {i}")


# Loops of several tiles, with a last tile of one token, and a full one; those of float32 are smaller.
TILES, TILES_OF_F32 = (0, 193, 128), (65, 32)
# lengths, and arguments of ``sequences``
NATIVE = [
    *((LENGTHS, {"head_dim": dim, "dtype": dtype}) for dim in (32, 64) for dtype in (F32, BF16, F16)),
    *(((33, 0, 5), {"head_dim": dim}) for dim in (8, 80, 128)),
    (TILES, {"heads": 1, "head_dim": 64}),
]
OF_INTERPRETER = [
    *((LENGTHS, {"heads": 1, "dtype": dtype}) for dtype in (F32, BF16)),
    *(((33, 0, 5), {"head_dim": dim}) for dim in (64, 80)),
    *(((33, 0, 5), {"head_dim": dim, "dtype": F32}) for dim in (5, 128)),
    ((33, 0, 5), {"head_dim": 16, "dtype": F16}),
    (TILES_OF_F32, {"heads": 1, "dtype": F32}),
    *((TILES, {"heads": 1, "head_dim": dim}) for dim in (16, 32, 128)),
    *((TILES, {"heads": 1, "head_dim": dim, "dtype": F16}) for dim in (32, 64)),
    # The interpreter rounds score * scale before it subtracts lse, GPUs do not: float32 scores stay smaller.
    ((5, 70), {"heads": 1, "dtype": F32, "std": 4.0}),
]
CASES = [
    *here(NATIVE, OF_INTERPRETER),
    ((5, 70), {"heads": 1, "std": 12.0}),
    ((5, 33), {"scale": 0.5, "max_seqlen": 300}),
    ((2,), {"heads": 1, "head_dim": 1, "dtype": F32}),
    ((1, 2), {"heads": 2, "head_dim": 3, "dtype": F32}),
]


@pytest.mark.parametrize(("lengths", "options"), CASES, ids=str)
def test_lengths_and_head_dims(runner, lengths, options):
    """Scores of hundreds (std) overflow exp unless the maximum is subtracted, and underflow in other rows."""
    impl, device = runner
    if impl in OTHERS and (options.get("dtype") == F32 or options.get("head_dim", 32) % 8):
        pytest.skip("16-bit alone, and head dims that are multiples of 8")
    example = sequences(lengths, **options, device=device)
    actual = check(example, impl)
    if "std" not in options:
        judge_each(example, actual, lengths)


@native
@pytest.mark.parametrize(("dtype", "head_dim"), [(F32, 64), (BF16, 32)], ids=["fp32-64", "bf16-32"])
def test_the_models_lengths(runner, dtype, head_dim):
    """A batch of images of all sizes, one without tokens."""
    impl, device = runner
    if dtype == F32 and impl in OTHERS:
        pytest.skip("16-bit alone")
    lengths = (1, 2100, 2, 31, 32, 33, 1050, 0, 127, 4200, 128, 129)
    example = sequences(lengths, 1, head_dim, dtype, device=device)
    judge_each(example, check(example, impl), lengths)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("impl", "lengths", "longest"), [("sdpa", (33, 33, 33), 33), ("eager", LENGTHS, 150)], ids=["sdpa", "eager"]
)
def test_plain_pytorch(impl, lengths, longest, dtype):
    example = sequences(lengths, dtype=dtype, max_seqlen=longest)
    judge_each(example, check(example, impl), lengths)


def after_zeros(tensor, count):
    batch = tensor.new_zeros(count * len(tensor), *tensor.shape[1:])
    batch[-len(tensor) :] = tensor
    return batch


@pytest.mark.parametrize("many", [False, True], ids=["small", "more-than-two-to-the-31"])
def test_last_sequence(runner, many):
    """The last of many sequences, 2**31 elements later too, equals the sequence alone."""
    impl, device = runner
    if many and (device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30):
        pytest.skip("needs a GPU of 80 GB")
    count, length, heads, head_dim = (22_000, 128, 12, 64) if many else (3, 5, 2, 8)
    alone = sequences((length,), heads, head_dim, device=device)
    gradient = quantized(length, heads, head_dim, dtype=BF16, seed=1).to(device)
    qkv, bounds = after_zeros(alone.inputs["qkv"], count), cumulated((length,) * count).to(device)
    among = Case(OP, {"qkv": qkv}, alone.others | {"cu_seqlens": bounds})
    expected = differentiate(alone, impl, lambda _: [gradient])
    actual = differentiate(among, impl, lambda _: [after_zeros(gradient, count)])
    assert_same_bits(expected, {k: v[-length:] for k, v in actual.items()})


def test_separate_tensors_give_the_same_bits(runner):
    impl, device = runner
    example = sequences((5, 0, 33), device=device)
    qkv = torch.stack(example.inputs["qkv"].unbind(1)).requires_grad_()
    out = attention_varlen(*qkv, **example.others, impl=impl)
    assert torch.equal(out, example(impl))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(runner, layout):
    impl, device = runner
    example = sequences((5, 33), device=device)
    check(example._replace(inputs={"qkv": layouts(example.inputs["qkv"])[layout]}), impl)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
def test_kernels_of_others_get_what_they_can_load(layout):
    qkv = layouts(quantized(66, 3, 2, 32, dtype=BF16))[layout]
    loadable = torch_attention.loadable(qkv)
    assert torch.equal(loadable, qkv)
    assert loadable.data_ptr() % 16 == 0
    assert loadable.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in loadable.stride()[:-1])
    assert layout != "contiguous" or loadable is qkv


def test_rows_whose_exponentials_all_vanish_against_those_of_padding(runner):
    """Scores near -1000: exp2(0 - lse) of a key past the end is infinite."""
    if runner[0] != "triton":
        pytest.skip("of Triton's tiles")
    example = sequences((35,), heads=1, dtype=F32, device=runner[1])
    example.inputs["qkv"][:, 0], example.inputs["qkv"][:, 1] = 1.0, -30.0
    actual, expected = (differentiate(example, impl) for impl in (runner[0], "eager"))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


@pytest.mark.skipif(not INTERPRETED, reason="runs Triton's function by itself")
def test_exponentials_by_fma():
    """The error that its docstring states; exact at integers, so at the row's maximum."""
    from support.exp2_kernel import exp2_kernel

    def exp2(x):
        y = torch.empty_like(x)
        exp2_kernel[(1,)](x, y, len(x))
        return y

    x = torch.cat([torch.linspace(-125.9, 20.0, 2**15 - 127), torch.arange(-126.0, 1.0)])
    expected = x.double().exp2()
    assert ((exp2(x).double() - expected).abs() / expected).max() < 1.1e-4
    assert torch.equal(exp2(x[-128:])[-127:], x[-127:].exp2())
    small = torch.tensor([-126.5, -200.0, -1e30, float("-inf")])
    assert torch.equal(exp2(small), torch.full((4,), 2.0**-126))
    assert not exp2(torch.full((2,), float("nan"))).isfinite().any()


def test_sequences_do_not_meet(runner):
    """The content of one sequence, NaN included, changes no bit of another; nor does its position."""
    impl, device = runner
    among, gradient = sequences((7, 33, 40), device=device), quantized(80, 2, 32, dtype=BF16, seed=1).to(device)
    qkv = among.inputs["qkv"]
    alone = sequences((33,), device=device)._replace(inputs={"qkv": qkv[7:40].clone()})
    expected = differentiate(alone, impl, lambda _: [gradient[7:40]])
    qkv[:7] = qkv[40:] = float("nan")
    actual = differentiate(among, impl, lambda _: [gradient])
    assert_same_bits(expected, {k: v[7:40] for k, v in actual.items()})


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no-sequences", "empty-ones"])
@pytest.mark.parametrize("impl", here(["aten_cpu", "sdpa", "eager"], ["triton"]))
def test_no_tokens(impl, lengths):
    actual = differentiate(sequences(lengths, head_dim=8, dtype=F32), impl)
    assert actual["output0"].shape == (0, 2, 8)


def test_writing_into_the_output_raises():
    qkv = quantized(8, 3, 2, 8).requires_grad_()
    out = attention_varlen_packed(qkv * 1, cumulated((3, 5)), 5, impl="aten_cpu")
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.skipif(not INTERPRETED, reason="in the CPU's memory")
def test_offsets_beyond_2_to_31(runner):
    """Rows of q, k and v 2**30 elements apart, in memory of which only the rows are ever touched."""
    stride, rows = 2**30, quantized(3, 3, 1, 16, dtype=F16)
    memory = torch.UntypedStorage(2 * (2 * stride + 48))
    far = torch.tensor([], dtype=F16).set_(memory, 0, rows.shape, (stride, 16, 16, 1))
    far.copy_(rows)
    actual, expected = (ops.run(t, cumulated((3,)), 3, 0.25, runner[0])[0] for t in (far, rows))
    assert torch.equal(actual, expected)


@native
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("impl", "lengths"), [("auto", (5, 0, 33)), ("eager", (5, 33)), ("sdpa", (19, 19))])
def test_compiled_whole(impl, lengths, dynamic):
    example = sequences(lengths, dtype=F32)
    compiled = torch.compile(attention_varlen_packed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual = differentiate(example, None, function=lambda qkv: compiled(qkv, **example.others, impl=impl))
    for name, value in differentiate(example, impl).items():
        torch.testing.assert_close(actual[name], value)


def test_autocast_lowers_nothing():
    qkv = quantized(12, 3, 2, 8)
    for impl in ("aten_cpu", "sdpa", "eager"):
        plain = attention_varlen_packed(qkv, cumulated((6, 6)), 6, impl=impl)
        with torch.autocast("cpu", dtype=BF16):
            assert torch.equal(attention_varlen_packed(qkv, cumulated((6, 6)), 6, impl=impl), plain)


@pytest.mark.parametrize("impl", ["aten_cpu", "sdpa", "eager"])
def test_inference_and_another_default_device(impl):
    qkv, rest = quantized(12, 3, 2, 8), (cumulated((6, 6)), 6)
    plain = attention_varlen_packed(qkv, *rest, impl=impl)
    with torch.inference_mode(), torch.device("meta"):
        assert torch.equal(attention_varlen_packed(qkv, *rest, impl=impl), plain)


@pytest.mark.parametrize("impl", ["aten_cpu", "sdpa", "eager"])
def test_fake_tensors(impl):
    """Their bounds have no values that could be looked at."""
    with FakeTensorMode() as mode:
        qkv, cu_seqlens = (mode.from_tensor(t) for t in (quantized(12, 3, 2, 8, dtype=BF16), cumulated((6, 6))))
        out = attention_varlen_packed(qkv, cu_seqlens, 6, impl=impl)
    assert (out.shape, out.dtype) == ((12, 2, 8), BF16)


def test_small_outputs_of_long_sequences_are_not_lost_beside_large_ones():
    example = sequences((1, 300))
    actual = differentiate(example, "aten_cpu")
    judge_each(example, actual, (1, 300))
    actual["output0"][1:] *= 0.9
    with pytest.raises(AssertionError, match=r"output0 of sequence 1: .* budget"):
        judge_each(example, actual, (1, 300))


def good(**change):
    arguments = {name: torch.zeros(5, 2, 8) for name in "qkv"}
    return attention_varlen(**(arguments | {"cu_seqlens": cumulated((2, 3)), "max_seqlen": 3} | change))


def bounds(*numbers):
    return {"cu_seqlens": torch.tensor(numbers, dtype=torch.int32)}


BAD = {
    "integer q": (TypeError, "q must be", {name: torch.zeros(5, 2, 8, dtype=torch.int32) for name in "qkv"}),
    "dtype of k": (TypeError, r"k must be torch\.float32 as q is", {"k": torch.zeros(5, 2, 8, dtype=BF16)}),
    "shape of v": (ValueError, "v must be", {"v": torch.zeros(5, 2, 4)}),
    "device of v": (ValueError, "v is on meta", {"v": torch.zeros(5, 2, 8, device="meta")}),
    "rank": (ValueError, "must be \\(T, heads, head_dim\\)", {name: torch.zeros(5, 8) for name in "qkv"}),
    "no heads": (ValueError, "T alone may be 0, got", {name: torch.zeros(5, 0, 8) for name in "qkv"}),
    "no head dim": (ValueError, "T alone may be 0, got", {name: torch.zeros(5, 2, 0) for name in "qkv"}),
    "int64 cu_seqlens": (TypeError, "cu_seqlens must be int32", {"cu_seqlens": torch.tensor([0, 2, 5])}),
    "rank of cu_seqlens": (ValueError, "cu_seqlens must be", {"cu_seqlens": cumulated((2, 3))[None]}),
    "tensor max_seqlen": (TypeError, "max_seqlen must be an int", {"max_seqlen": torch.tensor(3)}),
    "short max_seqlen": (ValueError, "5 tokens do not fit into 2 sequences of at most max_seqlen = 2",
                         {"max_seqlen": 2}),
    "negative scale": (ValueError, "scale must be positive", {"scale": -1.0}),
    "scale of nan": (ValueError, "scale must be positive", {"scale": float("nan")}),
    "text as scale": (TypeError, "scale must be a number, got str", {"scale": "0.5"}),
    "word": (ValueError, "impl: 'fast'.*flash_attn", {"impl": "fast"}),
    "fp64 in flash_attn": (
        KernelUnavailableError, r"flash_attn cannot run: no kernel for .*float64 \(use eager, or bfloat16, float16\)",
        {n: torch.zeros(5, 2, 8).double() for n in "qkv"} | {"impl": "flash_attn"},
    ),
    "lengths differ": (KernelUnavailableError, "it takes sequences of one length.*auto would choose aten_cpu",
                       {"impl": "sdpa"}),
}  # fmt: skip
BAD_BOUNDS = {
    "start": ("must start at 0, got 1", bounds(1, 2, 5)),
    "descent": ("must not descend, got 2 after 3 at 2", bounds(0, 3, 2, 5)),
    "end": ("must end at T = 5, got 4", bounds(0, 2, 4)),
    "max_seqlen": ("sequence 1 has 4 tokens, max_seqlen is 3", bounds(0, 1, 5)),
}


@pytest.mark.parametrize(("error", "message", "change"), BAD.values(), ids=BAD)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        good(**change)


@pytest.mark.parametrize("impl", ["cpp", "eager"])
@pytest.mark.parametrize(("message", "change"), BAD_BOUNDS.values(), ids=BAD_BOUNDS)
def test_bad_bounds(message, change, impl):
    with pytest.raises(ValueError, match=message):
        good(impl=impl, **change)


def test_bad_packed():
    with pytest.raises(ValueError, match=r"qkv must be \(T, 3, heads, head_dim\)"):
        attention_varlen_packed(torch.zeros(5, 2, 2, 8), cumulated((2, 3)), 3)
    with pytest.raises(TypeError, match="qkv must be a tensor, got list"):
        attention_varlen_packed([1.0], cumulated((2, 3)), 3)


def test_every_reason_has_its_remedy_in_brackets(gpu):
    def refusals(devices, dtypes):
        calls = [dispatch.Call(torch.device(d), (t,), None, n) for d in devices for t in dtypes for n in (64, 300)]
        return {impl.refusal(call) for impl in ops.IMPLEMENTATIONS.values() for call in calls}

    reasons = refusals(("cpu", "cuda"), (F32, torch.float64))
    gpu.capability = (7, 5)
    reasons |= refusals(("cuda",), (BF16,))
    assert len(reasons) > len(ops.IMPLEMENTATIONS)
    assert all(reason is None or reason.endswith(")") for reason in reasons)


def test_bounds_in_compiled_code_are_checked_by_the_kernel():
    compiled = torch.compile(attention_varlen_packed, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="must end at T = 5, got 4"):
        compiled(torch.zeros(5, 3, 2, 8), cumulated((2, 2)), 3)


@pytest.mark.parametrize("word", ["cpp", "eager", "auto"])
def test_words_of_every_operation(word):
    with use(word):
        assert good().shape == (5, 2, 8)


def test_own_words_are_the_arguments_alone():
    with pytest.raises(ValueError, match="'sdpa' is not an implementation"), use("sdpa"):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """Mocks a GPU, without flash-attn's packages."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu.capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    flash_attn._module.cache_clear()
    gpu.capability = (9, 0)
    yield gpu
    flash_attn._module.cache_clear()
    dispatch.forget()


def chosen(head_dim, dtype=BF16, equal=False, impl="auto"):
    dispatch.forget()
    return dispatch.resolve(OP, impl, torch.device("cuda"), (dtype,), None, head_dim, equal)


def install(monkeypatch, name, **functions):
    """Mocks a package of flash-attn: records calls and computes the reference."""
    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, deterministic):
        calls.append(("varlen", deterministic))
        assert cu_seqlens_q is cu_seqlens_k
        assert max_seqlen_q == max_seqlen_k
        return reference.attention_varlen(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale), "the sums"

    def packed(qkv, cu_seqlens, max_seqlen, *, softmax_scale, deterministic):
        calls.append(("packed", deterministic))
        return reference.attention_varlen(*qkv.unbind(1), cu_seqlens, max_seqlen, softmax_scale)

    parts = name.split(".")
    for i in range(1, len(parts)):
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    module = types.ModuleType(name)
    module.flash_attn_varlen_func, module.flash_attn_varlen_qkvpacked_func = varlen, packed
    monkeypatch.setitem(sys.modules, name, module)
    flash_attn._module.cache_clear()
    return calls


def test_order_on_a_gpu(gpu, monkeypatch):
    assert [chosen(64), chosen(32), chosen(100), chosen(200)] == ["torch_varlen", "triton", "triton", "torch_varlen"]
    assert [chosen(64, equal=True), chosen(32, equal=True)] == ["sdpa", "triton"]
    assert [chosen(64, F32), chosen(32, F32), chosen(32, F32, equal=True)] == ["triton", "triton", "sdpa"]
    assert chosen(64, torch.float64) == "eager"
    install(monkeypatch, "flash_attn")
    assert [chosen(64), chosen(32), chosen(64, F32)] == ["flash_attn", "triton", "triton"]
    gpu.capability = (7, 5)
    assert chosen(64) == "eager"


def test_head_dims_that_are_refused_say_what_takes_them(gpu, monkeypatch):
    with pytest.raises(KernelUnavailableError, match=r"head dims up to 128, got 160 .* would choose torch_varlen"):
        chosen(160, impl="triton")
    with pytest.raises(KernelUnavailableError, match=r"torch_varlen cannot run: .* got 50 .* would choose triton"):
        chosen(50, impl="cuda")
    with pytest.raises(KernelUnavailableError, match="flash-attn for this GPU is not installed"):
        chosen(64, impl="flash_attn")


def test_auto_probes_no_slower_implementation(gpu, monkeypatch):
    monkeypatch.setattr(flash_attn, "_usable", lambda device: pytest.fail("looked for flash-attn"))
    assert chosen(32) == "triton"
    assert chosen(64, equal=True) == "sdpa"


def test_general_words_have_names_of_their_own(gpu):
    assert chosen(64, impl="cuda") == "torch_varlen"
    assert chosen(64, F32, equal=True, impl="cuda") == "torch_varlen"
    with use("cpp"), pytest.raises(KernelUnavailableError, match="aten_cpu cannot run"):
        chosen(64, impl=None)


@pytest.mark.parametrize(
    ("name", "capability", "call"),
    [("flash_attn", (8, 0), "packed"), ("flash_attn_interface", (9, 0), "varlen"),
     ("flash_attn.cute.interface", (10, 0), "varlen")],
    ids=["2", "3", "4"],
)  # fmt: skip
def test_flash_attn_is_called_rightly(gpu, monkeypatch, name, capability, call):
    calls, gpu.capability = install(monkeypatch, name), capability
    assert flash_attn.supports(dispatch.Call(torch.device("cuda"), (BF16,))) is None
    qkv, cu_seqlens = quantized(9, 3, 2, 64), cumulated((3, 6))
    actual = flash_attn.attention(qkv, cu_seqlens, 6, 0.3)
    assert torch.equal(actual, attention_varlen_packed(qkv, cu_seqlens, 6, scale=0.3, impl="eager"))
    assert calls == [(call, False)]


def test_flash_attn_4_takes_few_head_dims(gpu, monkeypatch):
    install(monkeypatch, "flash_attn.cute.interface")
    gpu.capability = (10, 0)
    with pytest.raises(KernelUnavailableError, match="it takes head dims 64, 96, 128, got 32"):
        chosen(32, impl="flash_attn")


def test_flash_attn_of_another_gpu_is_not_taken(gpu, monkeypatch):
    install(monkeypatch, "flash_attn_interface")
    gpu.capability = (8, 0)
    assert "not installed" in flash_attn.supports(dispatch.Call(torch.device("cuda"), (BF16,)))


def test_varlen_attn_gets_common_arguments(monkeypatch):
    """The signature of the installed PyTorch takes what is passed; the kernel needs a GPU."""
    import inspect

    from torch.nn.attention import varlen

    seen = {}

    def varlen_attn(*args, **kwargs):
        seen.update(inspect.signature(original).bind(*args, **kwargs).arguments)

    original = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch_attention.varlen(torch.zeros(6, 3, 1, 8), "cu", 6, 0.3)
    assert (seen["cu_seq_q"], seen["cu_seq_k"], seen["max_q"], seen["max_k"], seen["scale"]) == ("cu", "cu", 6, 6, 0.3)


@pytest.fixture
def cudnn(monkeypatch):
    """Lists whether cuDNN's attention is enabled inside PyTorch's attention, whose calls are replaced."""
    from torch.nn.attention import varlen

    def attention(q, *others, scale):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        if scale == 13.0:
            raise RuntimeError("refused")
        return q

    seen = []
    monkeypatch.setattr(torch_attention.F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(varlen, "varlen_attn", attention)
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.benchmark
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield seen
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cudnn.benchmark = before[1]


def both(scale=0.3):
    qkv = torch.zeros(6, 3, 1, 8)
    torch_attention.sdpa(qkv, 3, scale)
    torch_attention.varlen(qkv, "cu", 3, scale)


def test_lengths_that_change_do_not_wait_for_cudnns_plans(cudnn):
    """At any number of calls: backward of checkpointing repeats forward with the kernel of forward."""
    for _ in range(3):
        both()
    assert cudnn == [False] * 6
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_cudnn_runs_where_the_user_says_that_shapes_repeat(cudnn):
    torch.backends.cudnn.benchmark = True
    both()
    assert cudnn == [True, True]


def test_users_settings_of_cudnn_survive(cudnn):
    with pytest.raises(RuntimeError, match="refused"):
        both(scale=13.0)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.benchmark = True
    both()
    assert cudnn == [False, False, False]
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_debugging_checks_bounds_on_any_device(monkeypatch):
    looked = []
    monkeypatch.setattr(debug, "check_cu_seqlens", lambda *a: looked.append(a))
    meta = {name: torch.zeros(5, 2, 8, device="meta") for name in "qkv"} | {"cu_seqlens": cumulated((2, 3)).to("meta")}
    good(**meta)
    assert not looked
    monkeypatch.setenv(debug.ENVIRONMENT, "1")
    good(**meta)
    assert len(looked) == 1


# Shared memory per program: the smallest GPUs of compute capability 8.x have 99 KiB.
SHARED = 99 * 1024
# Bytes of spilled registers: only float32 at the widest head, which the model does not use.
SPILLED = {("_attention_varlen_bwd_kv_kernel", F32, 128): 24, ("_attention_varlen_bwd_q_kernel", F32, 128): 40}


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_compiles_within_the_budget(capability, head_dim, dtype):
    from support.aot import compile_pair

    example = sequences((2100, 2100), 768 // head_dim, head_dim, dtype)
    compiled = compile_pair(OP, capability, lambda: differentiate(example, "triton"))
    assert len(compiled) == 3
    for one in compiled:
        assert one.stack <= SPILLED.get((one.name, dtype, head_dim), 0), one
        assert one.shared <= SHARED, one
        # A multiprocessor has 65536 registers, enough for one program of 8 warps.
        assert one.registers <= 255, one
        assert one.loads_16, one
        assert one.stores_16, one


def decoder(length=4200, head_dim=32):
    """A call with heads of the decoder, forward and backward."""
    example = sequences((length, length), 16, head_dim)
    return lambda: differentiate(example, "triton")


# Shared memory of a program: 64 KiB on gfx942, 227 on sm_100; sm_120 is not in the table of tiles.
@needs_compiler
@pytest.mark.parametrize(("target", "shared"), [(100, 227), (120, 99), ("gfx942", 64)], ids=str)
def test_tiles_of_other_gpus_fit(target, shared):
    from support.aot import compile_pair

    for one in compile_pair(OP, target, decoder()):
        assert one.stack == 0, one
        assert one.shared <= shared * 1024, one


@needs_compiler
def test_main_loops_on_hopper():
    """At most 8 instructions a score, matrix products that are not serialized, some exponentials by polynomials."""
    from support.sass_loops import main_loops

    loops = main_loops(OP, decoder())
    assert len(loops) == 3
    for loop in loops:
        c = loop.constants
        scores = c["BLOCK_M"] * c["BLOCK_N"] // (32 * c["num_warps"])  # of a thread
        assert loop.instructions <= 8 * scores, loop
        assert loop.waits < loop.products / 2, loop
        assert loop.exponentials < scores or "bwd_kv" in loop.kernel, loop
