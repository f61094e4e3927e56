"""attention_varlen: softmax attention within each sequence of a packed batch."""

import sys
import types

import pytest
import torch
from support.attention_ops import LENGTHS, check, cumulated, differentiate
from support.kernels import BF16, F16, F32, INTERPRETED, here, layouts, native, needs_compiler, quantized, usable
from torch._subclasses import FakeTensorMode

from mimdet.kernels import KernelUnavailableError, attention_varlen, attention_varlen_packed, debug, dispatch, use
from mimdet.kernels.attention_varlen import aten_cpu, flash_attn, ops, reference, torch_attention

OP = "attention_varlen"
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
PLACES = {"aten_cpu": "cpu", "triton": "cuda", "flash_attn": "cuda", "torch_varlen": "cuda"}
OTHERS = ("flash_attn", "torch_varlen")  # 16-bit kernels only, head dims that are multiples of 8


@pytest.fixture(params=here(PLACES, {"triton": "cpu"}).items(), ids=here(PLACES, ["triton"]))
def runner(request):
    impl, device = request.param
    if not usable(OP, impl, device, BF16):
        pytest.skip(f"{impl} cannot run here")
    return impl, device


def takes(runner, dtype):
    impl, device = runner
    if dtype == F32 and impl in OTHERS:
        pytest.skip("16-bit alone")
    return {"impl": impl, "device": device}


@pytest.mark.parametrize("dtype", here([F32, BF16, F16], [F32, BF16]), ids=str)
@pytest.mark.parametrize("head_dim", here([32, 64], [32]))
def test_budget(runner, dtype, head_dim):
    check(**takes(runner, dtype), lengths=LENGTHS, heads=here(2, 1), head_dim=head_dim, dtype=dtype)


HEAD_DIMS = here([(8, BF16), (80, BF16), (128, BF16)], [(5, F32), (16, F16), (64, BF16), (80, BF16), (128, F32)])


@pytest.mark.parametrize(("head_dim", "dtype"), HEAD_DIMS, ids=str)
def test_other_head_dims(runner, head_dim, dtype):
    check(**takes(runner, dtype), lengths=(33, 0, 5), head_dim=head_dim, dtype=dtype)


WHOLE_TILES = here([(64, BF16)], [(32, F32), (32, BF16), (32, F16), (16, BF16), (64, F16), (128, BF16)])


@pytest.mark.parametrize(("head_dim", "dtype"), WHOLE_TILES, ids=str)
def test_whole_tiles_and_a_partial_one(runner, head_dim, dtype):
    """Loops of several tiles, with a last tile of one token, and a full one."""
    lengths = (65, 32) if dtype == F32 else (0, 193, 128)  # their tiles are smaller
    check(**takes(runner, dtype), lengths=lengths, heads=1, head_dim=head_dim, dtype=dtype)


@native
@pytest.mark.parametrize(("dtype", "head_dim"), [(F32, 64), (BF16, 32)], ids=["fp32-64", "bf16-32"])
def test_the_models_lengths(runner, dtype, head_dim):
    """A batch of images of all sizes, one without tokens."""
    lengths = (1, 2100, 2, 31, 32, 33, 1050, 0, 127, 4200, 128, 129)
    check(**takes(runner, dtype), lengths=lengths, heads=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("many", [False, True], ids=["small", "more-than-two-to-the-31"])
def test_last_sequence(runner, many):
    """The last of many sequences, 2**31 elements later too, equals the sequence alone."""
    impl, device = runner
    if many and (device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30):
        pytest.skip("needs a GPU of 80 GB")
    count, length, heads, head_dim = (22_000, 128, 12, 64) if many else (3, 5, 2, 8)
    last, gradient = (quantized(length, *s, heads, head_dim, dtype=BF16).to(device) for s in ((3,), ()))
    alone = differentiate(last, gradient, (length,), impl)

    def after_zeros(rows):
        batch = rows.new_zeros(count * length, *rows.shape[1:])
        batch[-length:] = rows
        return batch

    among = differentiate(after_zeros(last), after_zeros(gradient), (length,) * count, impl)
    assert all(torch.equal(among[name][-length:], value) for name, value in alone.items())


@pytest.mark.parametrize(("total", "heads", "head_dim"), [(1, 1, 1), (1, 2, 3), (5, 1, 1)], ids=str)
def test_smallest(runner, total, heads, head_dim):
    impl, device = runner
    if impl in OTHERS:
        pytest.skip("head dims are multiples of 8")
    check(impl, lengths=(total,), heads=heads, head_dim=head_dim, device=device)


def test_separate_tensors_and_a_second_call_give_the_same_bits(runner):
    impl, device = runner
    lengths = (5, 0, 33)
    qkv, gradient = (quantized(38, *s, dtype=BF16).to(device) for s in ((3, 2, 32), (2, 32)))
    first, second = (differentiate(qkv, gradient, lengths, impl) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in qkv.unbind(1)]
    out = attention_varlen(*leaves, cumulated(lengths).to(device), 33, impl=impl)
    apart = [out, *torch.autograd.grad(out, leaves, gradient)]
    for value, again, other in zip(first.values(), second.values(), apart, strict=True):
        assert torch.equal(value, again)
        assert torch.equal(value, other)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(runner, layout):
    def lay_out(t):
        # Backward of OTHERS takes any strides of the gradient (T, heads, D), but needs it aligned to 16 bytes.
        if layout == "offset" and t.dim() == 3 and runner[0] in OTHERS:
            return t
        return layouts(t)[layout]

    check(**takes(runner, BF16), lengths=(5, 33), dtype=BF16, layout=lay_out)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
def test_kernels_of_others_get_what_they_can_load(layout):
    qkv = layouts(quantized(66, 3, 2, 32, dtype=BF16))[layout]
    loadable = torch_attention.loadable(qkv)
    assert torch.equal(loadable, qkv)
    assert loadable.data_ptr() % 16 == 0
    assert loadable.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in loadable.stride()[:-1])
    assert layout != "contiguous" or loadable is qkv


def test_expanded_gradient(runner):
    impl, device = runner
    qkv = quantized(40, 3, 2, 32, dtype=BF16).to(device)
    gradient = torch.ones(1, 1, 1, dtype=BF16, device=device).expand(40, 2, 32)
    dense = differentiate(qkv, gradient.contiguous(), (7, 33), impl)
    assert all(torch.equal(v, dense[n]) for n, v in differentiate(qkv, gradient, (7, 33), impl).items())


def test_scale_and_a_longer_max_seqlen(runner):
    check(**takes(runner, BF16), lengths=(5, 33), dtype=BF16, scale=0.5, max_seqlen=300)


# The interpreter rounds score * scale before it subtracts lse, GPUs do not: float32 scores stay smaller.
@pytest.mark.parametrize(("dtype", "std"), here([(BF16, 12.0)], [(F32, 4.0), (BF16, 12.0)]), ids=str)
def test_large_scores(runner, dtype, std):
    """Scores of hundreds overflow exp unless the maximum is subtracted, and underflow in other rows."""
    check(**takes(runner, dtype), lengths=(5, 70), heads=1, dtype=dtype, std=std, each=False)


def test_rows_whose_exponentials_all_vanish_against_those_of_padding(runner):
    """Scores near -1000: exp2(0 - lse) of a key past the end is infinite."""
    if runner[0] != "triton":
        pytest.skip("of Triton's tiles")
    device = runner[1]
    qkv = torch.ones(35, 3, 1, 32)
    qkv[:, 1] = -30.0
    qkv[:, 2] = quantized(35, 1, 32)
    qkv, gradient = qkv.to(device), quantized(35, 1, 32, seed=1).to(device)
    actual, expected = (differentiate(qkv, gradient, (35,), impl) for impl in (runner[0], "eager"))
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
    qkv, gradient = (quantized(80, *s, dtype=BF16).to(device) for s in ((3, 2, 32), (2, 32)))
    alone = differentiate(qkv[7:40], gradient[7:40], (33,), impl)
    qkv[:7] = qkv[40:] = float("nan")
    among = differentiate(qkv, gradient, (7, 33, 40), impl)
    assert all(torch.equal(among[name][7:40], value) for name, value in alone.items())


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no-sequences", "empty-ones"])
@pytest.mark.parametrize("impl", here(["aten_cpu", "sdpa", "eager"], ["triton"]))
def test_no_tokens(impl, lengths):
    actual = differentiate(torch.zeros(0, 3, 2, 8), torch.zeros(0, 2, 8), lengths, impl, max_seqlen=0)
    assert actual["out"].shape == (0, 2, 8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dense(dtype):
    check("sdpa", (33, 33, 33), dtype=dtype, poison=False)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_eager(dtype):
    check("eager", LENGTHS, dtype=dtype, max_seqlen=150)


def test_reference_is_a_loop_over_sequences():
    lengths = (3, 0, 1, 4)
    q, k, v = quantized(8, 3, 2, 5, dtype=torch.float64).unbind(1)
    expected = []
    for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        a, b, c = (r.transpose(0, 1) for r in rows)
        expected.append(((a @ b.mT * 0.7).softmax(-1) @ c).transpose(0, 1))
    actual = reference.attention_varlen(q, k, v, cumulated(lengths), 6, 0.7)
    torch.testing.assert_close(actual, torch.cat(expected))


def test_reference_gradients():
    leaves = [quantized(6, 1, 3, dtype=torch.float64, seed=s).requires_grad_() for s in range(3)]
    function = lambda *t: reference.attention_varlen(*t, cumulated((2, 0, 4)), 5, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)


def test_writing_into_the_output_raises():
    qkv = quantized(8, 3, 2, 8).requires_grad_()
    out = attention_varlen_packed(qkv * 1, cumulated((3, 5)), 5, impl="aten_cpu")
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_opcheck(runner):
    impl, device = runner
    if impl in OTHERS:
        pytest.skip("an operation of its library")
    qkv, rest = quantized(9, 3, 2, 8).to(device), (cumulated((3, 0, 6)).to(device), 6, 0.5, impl)
    out, lse = ops.run(qkv, *rest)
    checks = {"test_utils": ("test_schema", "test_faketensor")} if INTERPRETED else {}
    leaf = qkv.clone().requires_grad_(not INTERPRETED)
    torch.library.opcheck(torch.ops.mimdet.attention_varlen.default, (leaf, *rest), **checks)
    backward = torch.ops.mimdet.attention_varlen_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), qkv, out, lse, *rest), **checks)


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
    total = sum(lengths)
    qkv, gradient = quantized(total, 3, 2, 32), quantized(total, 2, 32)
    compiled = torch.compile(attention_varlen_packed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaf = qkv.clone().requires_grad_()
    out = compiled(leaf, cumulated(lengths), max(lengths), impl=impl)
    out.backward(gradient)
    expected = differentiate(qkv, gradient, lengths, impl)
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(leaf.grad, torch.stack([expected[n] for n in ("dq", "dk", "dv")], 1))


def test_checkpointing():
    qkv, gradient = quantized(38, 3, 2, 8), quantized(38, 2, 8)
    leaf = qkv.clone().requires_grad_()
    again = torch.utils.checkpoint.checkpoint
    again(attention_varlen_packed, leaf, cumulated((5, 33)), 33, use_reentrant=False).backward(gradient)
    expected = differentiate(qkv, gradient, (5, 33), "auto")
    assert torch.equal(leaf.grad, torch.stack([expected[n] for n in ("dq", "dk", "dv")], 1))


def test_meta_tensors():
    qkv = torch.empty(9, 3, 2, 8, device="meta", dtype=BF16)
    out, lse = ops.run(qkv, cumulated((3, 6)).to("meta"), 6, 0.5, "triton")
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((9, 2, 8), BF16, (2, 9), F32)


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


MUTATIONS = {
    "scale": ("fwd", lambda qkv, cu, longest, scale, *rest: (qkv, cu, longest, scale * 1.1, *rest)),
    "heads mixed up": ("fwd", lambda qkv, *rest: (torch.stack([t.flip(1) if i else t for i, t in
                                                               enumerate(qkv.unbind(1))], 1), *rest)),
    "boundary off by one": (
        "fwd", lambda qkv, cu, longest, *rest: (qkv, cu - (torch.arange(len(cu)) == 1).int(), longest + 1, *rest)
    ),
    "lse of another base": ("bwd", lambda dout, qkv, out, lse, *rest: (dout, qkv, out, lse * 0.6931, *rest)),
    "delta of another output": ("bwd", lambda dout, qkv, out, *rest: (dout, qkv, out.flip(0), *rest)),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(monkeypatch, runner, mutation):
    """The comparison itself: kernels with wrong arguments must fail it."""
    if runner not in (("aten_cpu", "cpu"), ("triton", "cpu")):
        pytest.skip("one implementation is enough")
    direction, change = MUTATIONS[mutation]
    right = ops.library.launch

    def wrong(name, impl, *arguments):
        right(name, impl, *(change(*arguments) if name.endswith(direction) else arguments))

    monkeypatch.setattr(ops.library, "launch", wrong)
    with pytest.raises(AssertionError, match="budget"):
        check(runner[0], (3, 17), heads=2, max_seqlen=18)


def test_small_outputs_of_long_sequences_are_not_lost_beside_large_ones(monkeypatch):
    right = aten_cpu.launch_attention_varlen_fwd

    def forward(qkv, cu_seqlens, max_seqlen, scale, out, lse):
        right(qkv, cu_seqlens, max_seqlen, scale, out, lse)
        out[1:] *= 0.9

    monkeypatch.setattr(ops.library, "_kernel", lambda name, impl: forward)
    monkeypatch.setattr(ops, "run_backward", lambda dout, qkv, *rest: torch.zeros_like(qkv))
    with pytest.raises(AssertionError, match=r"out of sequence 1: .* budget"):
        check("aten_cpu", (1, 300), dtype=BF16)


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
    "device of cu_seqlens": (ValueError, "cu_seqlens is on meta", {"cu_seqlens": cumulated((2, 3)).to("meta")}),
    "tensor max_seqlen": (TypeError, "max_seqlen must be an int", {"max_seqlen": torch.tensor(3)}),
    "short max_seqlen": (ValueError, "5 tokens do not fit into 2 sequences of at most max_seqlen = 2",
                         {"max_seqlen": 2}),
    "negative scale": (ValueError, "scale must be positive", {"scale": -1.0}),
    "scale of nan": (ValueError, "scale must be positive", {"scale": float("nan")}),
    "text as scale": (TypeError, "scale must be a number, got str", {"scale": "0.5"}),
    "word": (ValueError, "impl: 'fast'.*flash_attn", {"impl": "fast"}),
    "fp64 in cpp": (
        KernelUnavailableError, "float64", {n: torch.zeros(5, 2, 8).double() for n in "qkv"} | {"impl": "cpp"},
    ),
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

    heads = 768 // head_dim
    qkv, gradient = torch.empty(4200, 3, heads, head_dim, dtype=dtype), torch.empty(4200, heads, head_dim, dtype=dtype)
    compiled = compile_pair(OP, capability, lambda: differentiate(qkv, gradient, (2100, 2100), "triton"))
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
    qkv, gradient = (torch.empty(2 * length, *s, 16, head_dim, dtype=BF16) for s in ((3,), ()))
    return lambda: differentiate(qkv, gradient, (length, length), "triton")


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


@needs_compiler
def test_lengths_compile_nothing():
    """Numbers of tokens and tiles are not specialized: neither multiples of 16, nor 1."""
    from support.aot import launches, target
    from support.kernel_cases import pretend

    with target(90), pretend("triton", OP), launches() as recorded:
        for length in (4200, 4096, 77):
            decoder(length)()
        built = [one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants) for one in recorded]
    assert built[:3] == built[3:6] == built[6:]
