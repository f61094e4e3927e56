"""gather_add_pos: one rounding, so every implementation must give the reference's bits."""

import pytest
import torch
from kernels_testing import Guarded, assert_within_budget, layouts, poisoned_allocations, quantised

from mimdet.kernels import KernelUnavailableError
from mimdet.kernels.gather_add_pos import ops, reference
from mimdet.kernels.gather_add_pos.api import gather_add_pos
from mimdet.kernels.registry import can_run_cpp

needs_cpp = pytest.mark.skipif(can_run_cpp("cpu", torch.float32) is not None, reason="no C++ kernels here")
IMPLS = ["eager", pytest.param("cpp", marks=needs_cpp)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def inputs(batch, length, count, channels, x_dtype=F32, pos_dtype=F32):
    x = quantised(batch, length, channels, dtype=x_dtype)
    pos = quantised(length, channels, dtype=pos_dtype, seed=1) if pos_dtype else None
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return x, pos, order[:, :count]


def plainly(x, pos, index):
    rows = torch.stack([x[b, index[b]] for b in range(len(x))]) if len(x) else x[:, : index.shape[1]]
    return rows if pos is None else rows + pos[index]


def gradients(function, x, pos, index, grad):
    wanted = [x.detach().requires_grad_(), None if pos is None else pos.detach().requires_grad_()]
    out = function(*wanted, index)
    return torch.autograd.grad(out, [t for t in wanted if t is not None], grad.to(out.dtype))


@needs_cpp
@pytest.mark.parametrize("pos_dtype", [F32, BF16, None], ids=["pos-f32", "pos-bf16", "no-pos"])
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "shape",
    [(2, 40, 20, 96), (1, 1, 1, 1), (3, 7, 7, 17), (2, 9, 4, 15), (2, 9, 4, 16), (2, 9, 5, 33), (2, 11, 1, 1000)],
    ids=str,
)
def test_same_bits_as_plain_indexing(shape, x_dtype, pos_dtype):
    x, pos, index = inputs(*shape, x_dtype, pos_dtype)
    for impl in ("eager", "cpp"):
        got = gather_add_pos(x, pos, index, impl=impl)
        assert torch.equal(got, plainly(x, pos, index)), impl
        assert got.dtype == (torch.promote_types(x_dtype, pos_dtype) if pos_dtype else x_dtype)


@needs_cpp
@pytest.mark.parametrize("pos_dtype", [F32, BF16], ids=["pos-f32", "pos-bf16"])
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=["f32", "bf16"])
def test_gradients(x_dtype, pos_dtype):
    x, pos, index = inputs(3, 50, 20, 96, x_dtype, pos_dtype)
    out = torch.promote_types(x_dtype, pos_dtype)
    grad = quantised(3, 20, 96, dtype=out, seed=5)
    got = gradients(lambda *a: gather_add_pos(*a, impl="cpp"), x, pos, index, grad)
    same = gradients(reference.gather_add_pos, x, pos, index, grad)
    exact = gradients(reference.gather_add_pos, x.double(), pos.double(), index, grad)
    assert torch.equal(got[0], same[0])
    assert_within_budget(got[1], same[1], exact[1], reduction=3, name="pos")


@needs_cpp
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=["x", "pos", "both"])
def test_only_the_wanted_gradients(which):
    x, pos, index = inputs(2, 30, 10, 8)
    x.requires_grad_(which[0]), pos.requires_grad_(which[1])
    gather_add_pos(x, pos, index, impl="cpp").sum().backward()
    counts = torch.zeros(2, 30).scatter_(1, index, 1.0)
    assert (x.grad is not None, pos.grad is not None) == which
    if which[0]:
        assert torch.equal(x.grad, counts[..., None].expand_as(x))
    if which[1]:
        assert torch.equal(pos.grad, counts.sum(0)[:, None].expand_as(pos))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)], ids=["no-pictures", "nothing", "no-C"])
def test_empty(shape, impl):
    x, pos, index = inputs(*shape)
    x.requires_grad_()
    out = gather_add_pos(x, pos, index, impl=impl)
    assert out.shape == (shape[0], shape[2], shape[3])
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "transposed", "sliced", "offset", "expanded"])
def test_any_layout(layout, grad_layout):
    x, pos, index = inputs(2, 20, 9, 24)
    grad = quantised(2, 9, 24, seed=5)
    given = grad[:1, :1].expand(2, 9, 24) if grad_layout == "expanded" else layouts(grad)[grad_layout]
    args = layouts(x)[layout], layouts(pos)[layout], layouts(index)[layout]
    assert torch.equal(gather_add_pos(*args, impl="cpp"), plainly(x, pos, index))
    got = gradients(lambda *a: gather_add_pos(*a, impl="cpp"), *args, given)
    want = gradients(reference.gather_add_pos, x, pos, index, given.contiguous())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@needs_cpp
def test_rows_of_a_feature_map_are_not_copied():
    x, _, index = inputs(2, 12, 5, 8)
    feature = x.view(2, 3, 4, 8).permute(0, 3, 1, 2)  # channels_last
    tokens = feature.permute(0, 2, 3, 1).reshape(2, 12, 8)
    assert tokens.data_ptr() == x.data_ptr()
    every_other = torch.randn(4, 24, 8)[::2, ::2]
    assert torch.equal(gather_add_pos(every_other, None, index, impl="cpp"), plainly(every_other, None, index))


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_with_a_leading_one_and_int32(impl):
    x, pos, index = inputs(2, 20, 9, 24)
    assert torch.equal(gather_add_pos(x, pos[None], index.int(), impl=impl), plainly(x, pos, index))


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_tokens_of_a_feature_map(impl):
    # Three pictures' tokens as one picture's, each with a position of its own.
    feature = quantised(3, 16, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    pos = quantised(60, 16, seed=1).requires_grad_()
    keep = torch.tensor([0, 7, 19, 20, 41, 59])
    tokens = feature.permute(0, 2, 3, 1).reshape(1, 60, 16)
    assert tokens.data_ptr() == feature.data_ptr()
    out = gather_add_pos(tokens, pos, keep[None], impl=impl)
    assert torch.equal(out[0], tokens[0, keep] + pos[keep])
    out.sum().backward()
    kept = torch.zeros(60).index_fill_(0, keep, 1.0)
    assert torch.equal(pos.grad, kept[:, None].expand(60, 16))
    assert torch.equal(feature.grad, kept.view(3, 1, 4, 5).expand(3, 16, 4, 5))


@needs_cpp
@pytest.mark.parametrize("channels", [15, 16, 17, 96])
def test_reads_and_writes_nothing_else(channels):
    made = [Guarded(t) for t in inputs(2, 20, 9, channels)]
    x, pos, index = (g.tensor for g in made)
    x.requires_grad_(), pos.requires_grad_()
    out = gather_add_pos(x, pos, index, impl="cpp")
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()
    for guarded in made:
        guarded.check()


@needs_cpp
def test_rows_beyond_two_to_the_31(tmp_path):
    # A sparse file: four gigabytes of addresses, a few kilobytes of disk. 32-bit products of row and stride wrap.
    step, last = 2**25, 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step * last + 64, dtype=BF16)
    x = memory.as_strided((1, last + 1, 64), (0, step, 1))
    x[0, last], x[0, 0] = 3.0, 1.0
    out = gather_add_pos(x, None, torch.tensor([[0, last]]), impl="cpp")
    assert torch.equal(out, torch.tensor([[[1.0], [3.0]]]).expand(1, 2, 64).bfloat16())


@needs_cpp
def test_threads_and_repeats_give_the_same_bits():
    x, pos, index = inputs(4, 500, 250, 200)
    x.requires_grad_(), pos.requires_grad_()
    grad = quantised(4, 250, 200, seed=5)
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = gather_add_pos(x, pos, index, impl="cpp")
            runs.append([out, *torch.autograd.grad(out, (x, pos), grad)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gradcheck_of_the_reference():
    x, pos, index = inputs(2, 6, 3, 4, F64, F64)
    x.requires_grad_(), pos.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, pos: gather_add_pos(x, pos, index, impl="eager"), (x, pos))


def test_backward_reference_is_the_gradient():
    x, _, index = inputs(3, 11, 4, 5)
    grad = quantised(3, 4, 5, seed=5)
    x.requires_grad_()
    (want,) = torch.autograd.grad(reference.gather_add_pos(x, None, index), x, grad)
    assert torch.equal(reference.gather_add_pos_backward(grad, index, 11, F32), want)


@needs_cpp
@pytest.mark.parametrize("with_pos", [True, False], ids=["pos", "no-pos"])
def test_opcheck(with_pos):
    x, pos, index = inputs(2, 12, 5, 8)
    x.requires_grad_(), pos.requires_grad_()
    torch.library.opcheck(torch.ops.mimdet.gather_add_pos.default, (x, pos if with_pos else None, index, "cpp"))
    torch.library.opcheck(
        torch.ops.mimdet.gather_add_pos_backward.default, (quantised(2, 5, 8), index, 12, BF16, "cpp")
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(impl, dynamic):
    torch._dynamo.reset()
    # Inductor's own code is not what is tested, and slow to make.
    backend = "aot_eager" if impl == "eager" else "inductor"
    compiled = torch.compile(lambda *a: gather_add_pos(*a, impl=impl), fullgraph=True, dynamic=dynamic, backend=backend)
    for length, count in ((20, 9), (31, 12)):
        x, pos, index = inputs(2, length, count, 24)
        assert torch.equal(compiled(x, pos, index), plainly(x, pos, index))
        grad = quantised(2, count, 24, seed=5)
        got = gradients(compiled, x, pos, index, grad)
        torch.testing.assert_close(got, gradients(reference.gather_add_pos, x, pos, index, grad), rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_keeps_the_sum_in_float32(impl):
    x, pos, index = inputs(2, 20, 9, 24)
    x.requires_grad_()
    linear = torch.nn.Linear(24, 24)
    with torch.autocast("cpu", dtype=BF16):
        out = gather_add_pos(linear(x), pos, index, impl=impl)
        want = plainly(linear(x), pos, index)
    assert out.dtype == F32
    assert torch.equal(out, want)
    out.sum().backward()
    assert x.grad.isfinite().all()


@needs_cpp
def test_backward_after_the_index_was_changed():
    x, pos, index = inputs(2, 20, 9, 24)
    index = index.clone()
    out = gather_add_pos(x.requires_grad_(), pos, index, impl="cpp")
    index.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, IndexError, r"index\[1, 2\] is -1"),
        (20, IndexError, r"outside of 0 .. 19"),
        (None, ValueError, "more than"),
    ],
    ids=["negative", "too-large", "twice"],
)
def test_debug_mode_names_a_bad_index(monkeypatch, impl, value, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    x, pos, index = inputs(2, 20, 9, 24)
    gather_add_pos(x, pos, index, impl=impl)
    index = index.clone()
    index[1, 2] = index[1, 0] if value is None else value
    with pytest.raises(error, match=message):
        gather_add_pos(x, pos, index, impl=impl)


@needs_cpp
@pytest.mark.parametrize("value", [-1, 20])
def test_cpp_never_reads_outside(value):
    x, pos, index = inputs(2, 20, 9, 24)
    index = index.clone()
    index[1, 2] = value
    with pytest.raises(RuntimeError, match=f"index holds {value}, outside of 0 .. L - 1 with L = 20"):
        gather_add_pos(x, pos, index, impl="cpp")
    with pytest.raises(RuntimeError, match=f"index holds {value}"):
        ops.run_backward(torch.zeros(2, 9, 24), index, 20, F32, "cpp")


X, POS, INDEX = torch.zeros(2, 5, 8), torch.zeros(5, 8), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X.int(), POS, INDEX), TypeError, "x must be of a float dtype"),
        ((X, POS.int(), INDEX), TypeError, "pos must be of a float dtype"),
        ((X, POS, INDEX.float()), TypeError, "index must be int32 or int64"),
        ((X[0], POS, INDEX), ValueError, r"x must be \(B, L, C\), got \(5, 8\)"),
        ((X, POS, INDEX[0]), ValueError, r"index must be \(2, K\), got \(3,\)"),
        ((X, POS, INDEX[:1]), ValueError, r"index must be \(2, K\), got \(1, 3\)"),
        ((X, POS[:4], INDEX), ValueError, r"pos must be \(5, 8\), got \(4, 8\)"),
        ((X, POS[:, :7], INDEX), ValueError, r"pos must be \(5, 8\), got \(5, 7\)"),
        ((X, X, INDEX), ValueError, r"pos must be \(5, 8\), got \(2, 5, 8\)"),
        ((X, POS, INDEX.to("meta")), ValueError, "index is on meta, x on cpu"),
        ((X, POS.to("meta"), INDEX), ValueError, "pos is on meta, x on cpu"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        gather_add_pos(*args)


@pytest.mark.parametrize(("impl", "dtype"), [("triton", F32), ("cuda", F32), ("cpp", F64), ("cpp", F16)], ids=str)
def test_what_cannot_run_says_why(impl, dtype):
    with pytest.raises(KernelUnavailableError, match=f"gather_add_pos: {impl} cannot run: "):
        gather_add_pos(X.to(dtype), POS.to(dtype), INDEX, impl=impl)


@pytest.mark.parametrize(("x_dtype", "pos_dtype"), [(F16, F32), (F16, BF16), (F64, F32), (F32, F64)], ids=str)
def test_other_dtypes_run_somehow(x_dtype, pos_dtype):
    x, pos, index = inputs(2, 20, 9, 24, x_dtype, pos_dtype)
    assert torch.equal(gather_add_pos(x, pos, index), plainly(x, pos, index))
