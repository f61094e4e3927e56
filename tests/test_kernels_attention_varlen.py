"""attention_varlen: softmax attention within each sequence of a packed batch."""

import sys
import types

import pytest
import torch
from attention_ops import LENGTHS, check, cumulated, differentiate
from kernels_testing import layouts, quantised
from torch._subclasses import FakeTensorMode

from mimdet.kernels import KernelUnavailableError, debug, registry, use
from mimdet.kernels.attention_varlen import api, flash_attn, ops, reference, torch_attention
from mimdet.kernels.attention_varlen.api import attention_varlen, attention_varlen_packed

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
RUNNERS = {
    "cpp": (torch_attention.can_run_cpu, "cpu"),
    "triton": (registry.can_run_triton, "cuda"),
    "flash_attn": (flash_attn.can_run, "cuda"),
    "cuda": (torch_attention.can_run_varlen, "cuda"),
}


@pytest.fixture(params=RUNNERS)
def runner(request):
    can_run, device = RUNNERS[request.param]
    reason = can_run(device, BF16)
    if reason:
        pytest.skip(reason)
    return request.param, device


def takes(runner, dtype):
    impl, device = runner
    if dtype == F32 and impl in ("flash_attn", "cuda"):
        pytest.skip("16-bit alone")
    return {"impl": impl, "device": device}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_budget(runner, dtype, head_dim):
    check(**takes(runner, dtype), lengths=LENGTHS, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("head_dim", [8, 80, 128])
def test_other_head_dims(runner, head_dim):
    check(**takes(runner, BF16), lengths=(33, 5), head_dim=head_dim, dtype=BF16)


@pytest.mark.parametrize(("dtype", "head_dim"), [(F32, 64), (BF16, 32)], ids=["fp32-64", "bf16-32"])
def test_the_models_lengths(runner, dtype, head_dim):
    """A batch of pictures of all sizes, one of them without a token."""
    lengths = (1, 2100, 2, 31, 32, 33, 1050, 0, 127, 4200, 128, 129)
    check(**takes(runner, dtype), lengths=lengths, heads=1, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("many", [False, True], ids=["small", "more-than-two-to-the-31"])
def test_last_sequence(runner, many):
    """The last of many sequences gives the same alone, 2**31 numbers of q and of the output later too."""
    impl, device = runner
    if many and (device == "cpu" or torch.cuda.get_device_properties(0).total_memory < 70 * 2**30):
        pytest.skip("needs a GPU of 80 GB")
    count, length, heads, head_dim = (22_000, 128, 12, 64) if many else (3, 5, 2, 8)
    last, gradient = (quantised(length, *s, heads, head_dim, dtype=BF16).to(device) for s in ((3,), ()))
    alone = differentiate(last, gradient, (length,), impl)

    def after_zeros(rows):
        made = rows.new_zeros(count * length, *rows.shape[1:])
        made[-length:] = rows
        return made

    among = differentiate(after_zeros(last), after_zeros(gradient), (length,) * count, impl)
    assert all(torch.equal(among[name][-length:], value) for name, value in alone.items())


@pytest.mark.parametrize(("total", "heads", "head_dim"), [(1, 1, 1), (1, 2, 3), (5, 1, 1)], ids=str)
def test_smallest(runner, total, heads, head_dim):
    impl, device = runner
    if impl in ("flash_attn", "cuda"):
        pytest.skip("head dims are multiples of 8")
    check(impl, lengths=(total,), heads=heads, head_dim=head_dim, device=device)


def test_separate_tensors_give_the_same_bits(runner):
    impl, device = runner
    lengths = (5, 0, 33)
    qkv, gradient = (quantised(38, *s, dtype=BF16).to(device) for s in ((3, 2, 32), (2, 32)))
    together, apart = (differentiate(qkv, gradient, lengths, impl, packed=packed) for packed in (True, False))
    assert all(torch.equal(apart[name], value) for name, value in together.items())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(runner, layout):
    def lay_out(t):
        # Others' backward takes any strides, but loads 16 bytes at a time wherever the gradient, (T, heads, D), begins.
        if layout == "offset" and t.dim() == 3 and runner[0] in ("flash_attn", "cuda"):
            return t
        return layouts(t)[layout]

    check(**takes(runner, BF16), lengths=(5, 33), dtype=BF16, layout=lay_out)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_kernels_of_others_get_what_they_can_load(monkeypatch, layout, packed):
    seen, dense = [], torch_attention.sdpa
    monkeypatch.setattr(torch_attention, "sdpa", lambda *a: (seen.extend(a[:3]), dense(*a))[1])
    check("sdpa", (33, 33), dtype=BF16, layout=lambda t: layouts(t)[layout], packed=packed, poison=False)
    for t in seen:
        assert t.data_ptr() % 16 == 0
        assert t.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in t.stride()[:-1])
    if layout == "contiguous":
        # Nothing is copied: all three lie in one memory.
        assert len({t.untyped_storage().data_ptr() for t in seen}) == 1


def test_expanded_gradient(runner):
    impl, device = runner
    qkv = quantised(40, 3, 2, 32, dtype=BF16).to(device)
    gradient = torch.ones(1, 1, 1, dtype=BF16, device=device).expand(40, 2, 32)
    dense = differentiate(qkv, gradient.contiguous(), (7, 33), impl)
    assert all(torch.equal(v, dense[n]) for n, v in differentiate(qkv, gradient, (7, 33), impl).items())


def test_scale_and_a_longer_max_seqlen(runner):
    check(**takes(runner, BF16), lengths=(5, 33), dtype=BF16, scale=0.5, max_seqlen=100)


def test_large_scores(runner):
    """Scores of hundreds overflow exp unless the greatest is taken off, and underflow it for other rows."""
    check(**takes(runner, BF16), lengths=(5, 33), dtype=BF16, std=12.0, each=False)


def test_sequences_do_not_meet(runner):
    """What stands in one sequence, NaN included, changes no bit of another; nor does its place."""
    impl, device = runner
    qkv, gradient = (quantised(80, *s, dtype=BF16).to(device) for s in ((3, 2, 32), (2, 32)))
    alone = differentiate(qkv[7:40], gradient[7:40], (33,), impl)
    qkv[:7] = qkv[40:] = float("nan")
    among = differentiate(qkv, gradient, (7, 33, 40), impl)
    assert all(torch.equal(among[name][7:40], value) for name, value in alone.items())


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no-sequences", "empty-ones"])
@pytest.mark.parametrize("impl", ["cpp", "sdpa", "eager"])
def test_no_tokens(impl, lengths):
    got = differentiate(torch.zeros(0, 3, 2, 8), torch.zeros(0, 2, 8), lengths, impl, max_seqlen=0)
    assert got["out"].shape == (0, 2, 8)


def test_repeats_bitwise_with_any_number_of_threads():
    qkv, gradient = quantised(600, 3, 2, 32), quantised(600, 2, 32)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(differentiate(qkv, gradient, (200, 200, 7, 193), "cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other[name], value) for other in results[1:] for name, value in results[0].items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_dense(dtype, packed):
    check("sdpa", (33, 33, 33), dtype=dtype, packed=packed, poison=False)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_eager(dtype):
    check("eager", LENGTHS, dtype=dtype, max_seqlen=150)


def test_reference_is_a_loop_over_sequences():
    lengths = (3, 0, 1, 4)
    q, k, v = quantised(8, 3, 2, 5, dtype=torch.float64).unbind(1)
    want = []
    for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        a, b, c = (r.transpose(0, 1) for r in rows)
        want.append(((a @ b.mT * 0.7).softmax(-1) @ c).transpose(0, 1))
    got = reference.attention_varlen(q, k, v, cumulated(lengths), 6, 0.7)
    torch.testing.assert_close(got, torch.cat(want))


def test_reference_gradients():
    leaves = [quantised(6, 1, 3, dtype=torch.float64, seed=s).requires_grad_() for s in range(3)]
    function = lambda *t: reference.attention_varlen(*t, cumulated((2, 0, 4)), 5, 0.7)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)


def test_writing_into_the_output_is_noticed():
    qkv = quantised(8, 3, 2, 8).requires_grad_()
    out = attention_varlen_packed(qkv * 1, cumulated((3, 5)), 5, impl="cpp")
    out.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_opcheck(packed):
    qkv, cu_seqlens = quantised(9, 3, 2, 8), cumulated((3, 0, 6))
    tensors = (qkv, None, None) if packed else qkv.unbind(1)
    rest = (cu_seqlens, 6, 0.5, "cpp")
    out, lse = ops.run(*tensors, *rest)
    leaves = (t if t is None else t.clone().requires_grad_() for t in tensors)
    torch.library.opcheck(torch.ops.mimdet.attention_varlen.default, (*leaves, *rest))
    torch.library.opcheck(
        torch.ops.mimdet.attention_varlen_backward.default, (torch.ones_like(out), *tensors, out, lse, *rest)
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("impl", "lengths"), [("auto", (5, 0, 33)), ("eager", (5, 33)), ("sdpa", (19, 19))])
def test_compiled_whole(impl, lengths, dynamic):
    total = sum(lengths)
    qkv, gradient = quantised(total, 3, 2, 32), quantised(total, 2, 32)
    compiled = torch.compile(attention_varlen_packed, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    leaf = qkv.clone().requires_grad_()
    out = compiled(leaf, cumulated(lengths), max(lengths), impl=impl)
    out.backward(gradient)
    want = differentiate(qkv, gradient, lengths, impl)
    torch.testing.assert_close(out.detach(), want["out"])
    torch.testing.assert_close(leaf.grad, torch.stack([want[n] for n in ("dq", "dk", "dv")], 1))


def test_checkpointing():
    qkv, gradient = quantised(38, 3, 2, 8), quantised(38, 2, 8)
    leaf = qkv.clone().requires_grad_()
    again = torch.utils.checkpoint.checkpoint
    again(attention_varlen_packed, leaf, cumulated((5, 33)), 33, use_reentrant=False).backward(gradient)
    want = differentiate(qkv, gradient, (5, 33), "auto")
    assert torch.equal(leaf.grad, torch.stack([want[n] for n in ("dq", "dk", "dv")], 1))


def test_meta_tensors():
    qkv = torch.empty(9, 3, 2, 8, device="meta", dtype=BF16)
    out, lse = ops.run(qkv, None, None, cumulated((3, 6)).to("meta"), 6, 0.5, "triton")
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == ((9, 2, 8), BF16, (2, 9), F32)


def test_autocast_lowers_nothing():
    qkv = quantised(12, 3, 2, 8)
    for impl in ("cpp", "sdpa", "eager"):
        plain = attention_varlen_packed(qkv, cumulated((6, 6)), 6, impl=impl)
        with torch.autocast("cpu", dtype=BF16):
            assert torch.equal(attention_varlen_packed(qkv, cumulated((6, 6)), 6, impl=impl), plain)


@pytest.mark.parametrize("impl", ["cpp", "sdpa", "eager"])
def test_inference_and_another_default_device(impl):
    qkv, rest = quantised(12, 3, 2, 8), (cumulated((6, 6)), 6)
    plain = attention_varlen_packed(qkv, *rest, impl=impl)
    with torch.inference_mode(), torch.device("meta"):
        assert torch.equal(attention_varlen_packed(qkv, *rest, impl=impl), plain)


@pytest.mark.parametrize("impl", ["cpp", "sdpa", "eager"])
def test_fake_tensors(impl):
    """Their bounds have no values that could be looked at."""
    with FakeTensorMode() as mode:
        qkv, cu_seqlens = (mode.from_tensor(t) for t in (quantised(12, 3, 2, 8, dtype=BF16), cumulated((6, 6))))
        out = attention_varlen_packed(qkv, cu_seqlens, 6, impl=impl)
    assert (out.shape, out.dtype) == ((12, 2, 8), BF16)


FAULTS = {
    "wrong scale": lambda q, k, v, cu, longest, scale: (q, k, v, cu, longest, scale * 1.1),
    "heads mixed up": lambda q, k, v, *rest: (q, k.flip(1), v, *rest),
    "boundary off by one": lambda q, k, v, cu, *rest: (q, k, v, cu - (torch.arange(len(cu)) == 1).int(), 99, rest[1]),
}


@pytest.mark.parametrize("fault", [*FAULTS, "last token lost", "gradient of k unscaled"])
def test_faults_are_caught(monkeypatch, fault):
    """The comparison itself: each of these wrong kernels must fail it."""
    right, right_backward = torch_attention.cpu_forward, torch_attention.cpu_backward

    def forward(*arguments):
        out, lse = right(*FAULTS.get(fault, lambda *a: a)(*arguments))
        if fault == "last token lost":
            out[-1] = 0
        return out, lse

    def backward(*arguments):
        grads = right_backward(*arguments)
        if fault == "gradient of k unscaled":
            grads[:, 1] /= arguments[-1]
        return grads

    monkeypatch.setattr(torch_attention, "cpu_forward", forward)
    monkeypatch.setattr(torch_attention, "cpu_backward", backward)
    with pytest.raises(AssertionError, match="budget"):
        check("cpp", (7, 33), head_dim=8)


def test_small_outputs_of_long_sequences_are_not_lost_beside_large_ones(monkeypatch):
    right = torch_attention.cpu_forward

    def forward(*arguments):
        out, lse = right(*arguments)
        out[1:] *= 0.9
        return out, lse

    monkeypatch.setattr(torch_attention, "cpu_forward", forward)
    with pytest.raises(AssertionError, match=r"out of sequence 1: .* budget"):
        check("cpp", (1, 300), dtype=BF16)


def good(**change):
    made = {name: torch.zeros(5, 2, 8) for name in "qkv"}
    return attention_varlen(**(made | {"cu_seqlens": cumulated((2, 3)), "max_seqlen": 3} | change))


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
        KernelUnavailableError, r"no flash-attn kernel for torch\.float64 \(use eager, or bfloat16 or float16\)",
        {n: torch.zeros(5, 2, 8).double() for n in "qkv"} | {"impl": "flash_attn"},
    ),
    "lengths differ": (KernelUnavailableError, "sdpa takes sequences of one length.*What can here: cpp, eager",
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
    reasons = {can_run(d, t) for can_run, _ in RUNNERS.values() for d in ("cpu", "cuda") for t in (F32, torch.float64)}
    gpu.capability = (7, 5)
    reasons |= {can_run("cuda", BF16) for can_run, _ in RUNNERS.values()}
    assert len(reasons) > len(RUNNERS)
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
    """A GPU that all but flash-attn's packages believe in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu.capability)
    monkeypatch.setattr(torch.version, "hip", None)
    flash_attn._module.cache_clear()
    gpu.capability = (9, 0)
    yield gpu
    flash_attn._module.cache_clear()


def chosen(head_dim, dtype=BF16, equal=False, impl="auto"):
    tensor = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), dtype=dtype, shape=(8, 2, head_dim))
    return api._choose(impl, tensor, equal)


def install(monkeypatch, name, **functions):
    """A package of flash-attn that records calls and computes the reference."""
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
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: name)
    assert [chosen(64), chosen(32), chosen(100), chosen(200)] == ["cuda", "triton", "triton", "cuda"]
    assert [chosen(64, equal=True), chosen(32, equal=True)] == ["sdpa", "triton"]
    assert [chosen(64, F32), chosen(32, F32), chosen(32, F32, equal=True)] == ["triton", "triton", "sdpa"]
    assert chosen(64, torch.float64) == "eager"
    install(monkeypatch, "flash_attn")
    assert [chosen(64), chosen(32), chosen(64, F32)] == ["flash_attn", "triton", "triton"]
    gpu.capability = (7, 5)
    assert chosen(64) == "eager"


def test_head_dims_that_are_refused_say_what_takes_them(gpu, monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(
        KernelUnavailableError, match=r"triton takes head dims up to 128, got 160\. What can here: cuda"
    ):
        chosen(160, impl="triton")
    with pytest.raises(
        KernelUnavailableError, match=r"cuda takes head dims that are .* got 50\. What can here: triton"
    ):
        chosen(50, impl="cuda")
    with pytest.raises(KernelUnavailableError, match="flash-attn for this GPU is not installed"):
        chosen(64, impl="flash_attn")


@pytest.mark.parametrize(
    ("name", "capability", "call"),
    [("flash_attn", (8, 0), "packed"), ("flash_attn_interface", (9, 0), "varlen"),
     ("flash_attn.cute.interface", (10, 0), "varlen")],
    ids=["2", "3", "4"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_flash_attn_is_called_rightly(gpu, monkeypatch, name, capability, call, packed):
    calls, gpu.capability = install(monkeypatch, name), capability
    assert flash_attn.can_run("cuda", BF16) is None
    qkv, cu_seqlens = quantised(9, 3, 2, 64), cumulated((3, 6))
    got = flash_attn.attention(qkv if packed else qkv.unbind(1), cu_seqlens, 6, 0.3)
    assert torch.equal(got, attention_varlen_packed(qkv, cu_seqlens, 6, scale=0.3, impl="eager"))
    assert calls == [(call if packed else "varlen", False)]


def test_flash_attn_4_takes_few_head_dims(gpu, monkeypatch):
    install(monkeypatch, "flash_attn.cute.interface")
    gpu.capability = (10, 0)
    with pytest.raises(KernelUnavailableError, match="flash_attn takes head dims 64, 96, 128, got 32"):
        chosen(32, impl="flash_attn")


def test_flash_attn_of_another_gpu_is_not_taken(gpu, monkeypatch):
    install(monkeypatch, "flash_attn_interface")
    gpu.capability = (8, 0)
    assert "not installed" in flash_attn.can_run("cuda", BF16)


def test_varlen_attn_gets_common_arguments(monkeypatch):
    """The signature of the installed PyTorch takes what is passed; the kernel needs a GPU."""
    import inspect

    from torch.nn.attention import varlen

    seen = {}

    def varlen_attn(*args, **kwargs):
        seen.update(inspect.signature(original).bind(*args, **kwargs).arguments)

    original = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    torch_attention.varlen("q", "k", "v", "cu", 6, 0.3)
    assert (seen["cu_seq_q"], seen["cu_seq_k"], seen["max_q"], seen["max_k"], seen["scale"]) == ("cu", "cu", 6, 6, 0.3)


def test_debugging_checks_bounds_on_any_device(monkeypatch):
    looked = []
    monkeypatch.setattr(api.debug, "check_cu_seqlens", lambda *a: looked.append(a))
    monkeypatch.setattr(ops, "run", lambda *a: (torch.zeros(()),))
    monkeypatch.setattr(api, "_choose", lambda *a: "triton")
    meta = {name: torch.zeros(5, 2, 8, device="meta") for name in "qkv"} | {"cu_seqlens": cumulated((2, 3)).to("meta")}
    good(**meta)
    assert not looked
    monkeypatch.setenv(debug.ENVIRONMENT, "1")
    good(**meta)
    assert len(looked) == 1
