"""scatter_fill: one rounding, so every implementation must give the reference's bits."""

import pytest
import torch
from kernels_testing import Guarded, assert_within_budget, layouts, poisoned_allocations, quantised

from mimdet.kernels import KernelUnavailableError
from mimdet.kernels.registry import can_run_cpp
from mimdet.kernels.sample_tokens.api import sample_packed_tokens, valid_tokens
from mimdet.kernels.scatter_fill import ops, reference
from mimdet.kernels.scatter_fill.api import scatter_fill

needs_cpp = pytest.mark.skipif(can_run_cpp("cpu", torch.float32) is not None, reason="no C++ kernels here")
IMPLS = ["eager", pytest.param("cpp", marks=needs_cpp)]
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def inputs(batch, length, count, channels, dtype=F32, pos_dtype=F32, padding=0):
    restore = torch.rand(batch, length + padding, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    restore = torch.where(restore < length, restore, -1)
    kept = quantised(batch, count, channels, dtype=dtype)
    fill = quantised(batch, length - count, channels, dtype=dtype, seed=1)
    return kept, fill, restore, quantised(length + padding, channels, dtype=pos_dtype, seed=3)


def plainly(kept, fill, restore, pos):
    rows = torch.cat([kept, fill], dim=1)
    out = rows.gather(1, restore.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[-1])) + pos
    return torch.where((restore < 0)[..., None], 0, out)


def gradients(function, kept, fill, restore, pos, grad):
    wanted = [t.detach().requires_grad_() for t in (kept, fill, pos)]
    out = function(*wanted[:2], restore, wanted[2])
    return torch.autograd.grad(out, wanted, grad.to(out.dtype))


SHAPES = [(2, 40, 20, 96), (1, 1, 1, 1), (3, 7, 6, 17), (2, 9, 4, 15), (2, 9, 4, 16), (2, 9, 5, 33), (2, 11, 1, 1000)]


@needs_cpp
@pytest.mark.parametrize("pos_dtype", [F32, BF16], ids=["pos-f32", "pos-bf16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_concatenation(shape, dtype, pos_dtype):
    args = inputs(*shape, dtype, pos_dtype)
    for impl in ("eager", "cpp"):
        got = scatter_fill(*args, impl=impl)
        assert torch.equal(got, plainly(*args)), impl
        assert got.dtype == torch.promote_types(dtype, pos_dtype)


@needs_cpp
@pytest.mark.parametrize("pos_dtype", [F32, BF16], ids=["pos-f32", "pos-bf16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_gradients(dtype, pos_dtype):
    args = inputs(3, 50, 20, 96, dtype, pos_dtype)
    grad = quantised(3, 50, 96, dtype=torch.promote_types(dtype, pos_dtype), seed=5)
    got = gradients(lambda *a: scatter_fill(*a, impl="cpp"), *args, grad)
    same = gradients(plainly, *args, grad)
    exact = gradients(plainly, *(t if t is args[2] else t.double() for t in args), grad)
    assert torch.equal(got[0], same[0])
    assert torch.equal(got[1], same[1])
    assert_within_budget(got[2], same[2], exact[2], reduction=3, name="pos")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(2, 20, 9, 24), (1, 7, 7, 17), (3, 5, 0, 16)], ids=str)
def test_padding_is_zeros_without_gradient(shape, impl):
    args = inputs(*shape, padding=6)
    assert torch.equal(scatter_fill(*args, impl=impl), plainly(*args))
    grad = quantised(shape[0], shape[1] + 6, shape[3], seed=5)
    got = gradients(lambda *a: scatter_fill(*a, impl=impl), *args, grad)
    want = gradients(plainly, *args, grad)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[2], want[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_rows_as_one_picture(impl):
    sizes, grid = [(2, 3), (4, 1)], (4, 3)
    sample = sample_packed_tokens(torch.rand(2, 12), sizes, grid, 0.5)
    tokens, pos = quantised(24, 8), quantised(24, 8, seed=1)
    out = scatter_fill(tokens[sample.keep][None], tokens[sample.drop][None], sample.restore.view(1, -1), pos, impl=impl)
    valid = valid_tokens(sizes, grid, "cpu").view(1, 24, 1)
    assert torch.equal(out, torch.where(valid, tokens + pos, 0))


@needs_cpp
@pytest.mark.parametrize("wanted", [(0,), (1,), (3,), (0, 1), (0, 1, 3)], ids=str)
def test_only_the_wanted_gradients(wanted):
    args = inputs(2, 30, 10, 8)
    for i in wanted:
        args[i].requires_grad_()
    scatter_fill(*args, impl="cpp").sum().backward()
    for i in (0, 1, 3):
        if i in wanted:
            assert torch.equal(args[i].grad, torch.full_like(args[i], 2.0 if i == 3 else 1.0))
        else:
            assert args[i].grad is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape",
    [(0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 5, 8), (2, 5, 3, 0)],
    ids=["no-pictures", "all-filled", "all-kept", "no-D"],
)
def test_empty_parts(shape, impl):
    args = inputs(*shape)
    args[0].requires_grad_(), args[1].requires_grad_()
    out = scatter_fill(*args, impl=impl)
    assert torch.equal(out, plainly(*args))
    out.sum().backward()
    assert torch.equal(args[0].grad, torch.ones_like(args[0]))
    assert torch.equal(args[1].grad, torch.ones_like(args[1]))


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("grad_layout", ["contiguous", "transposed", "sliced", "offset", "expanded"])
def test_any_layout(layout, grad_layout):
    args = inputs(2, 20, 9, 24)
    grad = quantised(2, 20, 24, seed=5)
    given = grad[:1, :1].expand(2, 20, 24) if grad_layout == "expanded" else layouts(grad)[grad_layout]
    laid_out = [layouts(t)[layout] for t in args]
    assert torch.equal(scatter_fill(*laid_out, impl="cpp"), plainly(*args))
    got = gradients(lambda *a: scatter_fill(*a, impl="cpp"), *laid_out, given)
    want = gradients(plainly, *args, given.contiguous())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_mask_token_for_all(impl):
    kept, _, restore, pos = inputs(2, 20, 9, 24)
    token = quantised(1, 1, 24, seed=7).requires_grad_()
    fill = token.expand(2, 11, 24)
    out = scatter_fill(kept, fill, restore, pos, impl=impl)
    assert torch.equal(out, plainly(kept, fill, restore, pos))
    out.sum().backward()
    assert torch.equal(token.grad, torch.full_like(token, 22.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_with_a_leading_one_and_int32(impl):
    kept, fill, restore, pos = inputs(2, 20, 9, 24)
    assert torch.equal(scatter_fill(kept, fill, restore.int(), pos[None], impl=impl), plainly(kept, fill, restore, pos))


@needs_cpp
@pytest.mark.parametrize("channels", [15, 16, 17, 96])
def test_reads_and_writes_nothing_else(channels):
    made = [Guarded(t) for t in inputs(2, 20, 9, channels)]
    kept, fill, restore, pos = (g.tensor for g in made)
    for t in (kept, fill, pos):
        t.requires_grad_()
    out = scatter_fill(kept, fill, restore, pos, impl="cpp")
    assert out.isfinite().all()
    out.sum().backward()
    assert kept.grad.isfinite().all()
    assert fill.grad.isfinite().all()
    for guarded in made:
        guarded.check()


@needs_cpp
def test_rows_beyond_two_to_the_31(tmp_path):
    # A sparse file: four gigabytes of addresses, a few kilobytes of disk. 32-bit products of row and stride wrap.
    step, last = 2**25, 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step * last + 64, dtype=BF16)
    kept = memory.as_strided((1, last + 1, 64), (0, step, 1))
    kept[0, last] = 3.0
    restore = torch.arange(last + 2)[None]
    pos = torch.zeros(1, 1, dtype=BF16).expand(last + 2, 64)
    out = scatter_fill(kept, torch.ones(1, 1, 64, dtype=BF16), restore, pos, impl="cpp")
    assert torch.equal(out[0, -3:, 0], torch.tensor([0.0, 3.0, 1.0], dtype=BF16))


@needs_cpp
def test_threads_and_repeats_give_the_same_bits():
    args = inputs(4, 500, 250, 200)
    grad = quantised(4, 500, 200, seed=5)
    runs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            out = scatter_fill(*args, impl="cpp")
            runs.append([out, *gradients(lambda *a: scatter_fill(*a, impl="cpp"), *args, grad)])
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gradcheck_of_the_reference():
    kept, fill, restore, pos = inputs(2, 6, 3, 4, F64, F64)
    floats = [t.requires_grad_() for t in (kept, fill, pos)]
    assert torch.autograd.gradcheck(lambda k, f, p: scatter_fill(k, f, restore, p, impl="eager"), floats)


def test_backward_reference_is_the_gradient():
    kept, fill, restore, pos = inputs(3, 11, 4, 5, padding=2)
    grad = quantised(3, 13, 5, seed=5)
    want = gradients(reference.scatter_fill, kept, fill, restore, pos, grad)
    got = reference.scatter_fill_backward(grad, restore, 4, 7, F32)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@needs_cpp
@pytest.mark.parametrize("padding", [0, 3])
def test_opcheck(padding):
    kept, fill, restore, pos = inputs(2, 12, 5, 8, padding=padding)
    for t in (kept, fill, pos):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.mimdet.scatter_fill.default, (kept, fill, restore, pos, "cpp"))
    torch.library.opcheck(
        torch.ops.mimdet.scatter_fill_backward.default, (quantised(2, 12 + padding, 8), restore, 5, 7, BF16, "cpp")
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(impl, dynamic):
    torch._dynamo.reset()
    # Inductor's own code is not what is tested, and slow to make.
    backend = "aot_eager" if impl == "eager" else "inductor"
    compiled = torch.compile(lambda *a: scatter_fill(*a, impl=impl), fullgraph=True, dynamic=dynamic, backend=backend)
    for length, count in ((20, 9), (31, 12)):
        args = inputs(2, length, count, 24)
        assert torch.equal(compiled(*args), plainly(*args))
        grad = quantised(2, length, 24, seed=5)
        want = gradients(plainly, *args, grad)
        torch.testing.assert_close(gradients(compiled, *args, grad), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_keeps_the_sum_in_float32(impl):
    kept, fill, restore, pos = inputs(2, 20, 9, 24)
    linear = torch.nn.Linear(24, 24)
    with torch.autocast("cpu", dtype=BF16):
        out = scatter_fill(linear(kept), linear(fill), restore, pos, impl=impl)
        want = plainly(linear(kept), linear(fill), restore, pos)
    assert out.dtype == F32
    assert torch.equal(out, want)
    out.sum().backward()
    assert linear.weight.grad.isfinite().all()


@needs_cpp
def test_backward_after_restore_was_changed():
    kept, fill, restore, pos = inputs(2, 20, 9, 24)
    out = scatter_fill(kept.requires_grad_(), fill, restore, pos, impl="cpp")
    restore.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, IndexError, r"restore\[1, 2\] is -1"),
        (20, IndexError, r"outside of 0 .. 19"),
        (None, ValueError, r"restore\[1\] holds \d+ more than once"),
    ],
    ids=["negative", "too-large", "twice"],
)
def test_debug_mode_names_a_bad_row(monkeypatch, impl, value, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    kept, fill, restore, pos = inputs(2, 20, 9, 24)
    scatter_fill(kept, fill, restore, pos, impl=impl)
    restore[1, 2] = restore[1, 0] if value is None else value
    with pytest.raises(error, match=message):
        scatter_fill(kept, fill, restore, pos, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((0, -1), ValueError, r"restore\[1\] holds -1 more than 3 times"),
        ((-1, 4), ValueError, r"restore\[1\] holds 4 more than once"),
        ((-1, -2), IndexError, r"is -2, outside of 0 .. 11"),
    ],
    ids=["too-much-padding", "too-little-padding", "below"],
)
def test_debug_mode_counts_padding(monkeypatch, change, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    kept, fill, restore, pos = inputs(2, 12, 5, 8, padding=3)
    scatter_fill(kept, fill, restore, pos)
    restore[1, (restore[1] == change[0]).nonzero()[0]] = change[1]
    with pytest.raises(error, match=message):
        scatter_fill(kept, fill, restore, pos)


@needs_cpp
@pytest.mark.parametrize("value", [-1, 20])
def test_cpp_never_reads_or_writes_outside(value):
    kept, fill, restore, pos = inputs(2, 20, 9, 24)
    restore[1, 2] = value
    with pytest.raises(RuntimeError, match=f"restore holds {value}, outside of 0 .. K \\+ F - 1 with K \\+ F = 20"):
        scatter_fill(kept, fill, restore, pos, impl="cpp")
    with pytest.raises(RuntimeError, match=f"restore holds {value}"):
        ops.run_backward(torch.zeros(2, 20, 24), restore, 9, 11, F32, "cpp")


KEPT, FILL, POS = torch.zeros(2, 3, 8), torch.zeros(2, 2, 8), torch.zeros(5, 8)
RESTORE = torch.arange(5).repeat(2, 1)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((KEPT.int(), FILL, RESTORE, POS), TypeError, "kept must be of a float dtype"),
        ((KEPT, FILL.int(), RESTORE, POS), TypeError, "fill must be of a float dtype"),
        ((KEPT, FILL, RESTORE, POS.int()), TypeError, "pos must be of a float dtype"),
        ((KEPT, FILL.bfloat16(), RESTORE, POS), TypeError, "kept and fill must have one dtype"),
        ((KEPT, FILL, RESTORE.float(), POS), TypeError, "restore must be int32 or int64"),
        ((KEPT[0], FILL, RESTORE, POS), ValueError, r"kept must be \(B, K, D\), got \(3, 8\)"),
        ((KEPT, FILL[0], RESTORE, POS), ValueError, r"fill must be \(2, F, 8\), got \(2, 8\)"),
        ((KEPT, FILL[..., :7], RESTORE, POS), ValueError, r"fill must be \(2, F, 8\), got \(2, 2, 7\)"),
        ((KEPT, FILL[:1], RESTORE, POS), ValueError, r"fill must be \(2, F, 8\), got \(1, 2, 8\)"),
        ((KEPT, FILL, RESTORE[:, :4], POS), ValueError, r"restore must be \(2, 5 or more\), got \(2, 4\)"),
        ((KEPT, FILL, RESTORE, POS[:4]), ValueError, r"pos must be \(5, 8\), got \(4, 8\)"),
        ((KEPT, FILL, RESTORE.to("meta"), POS), ValueError, "restore is on meta, kept on cpu"),
        ((KEPT, FILL.to("meta"), RESTORE, POS), ValueError, "fill is on meta, kept on cpu"),
        ((KEPT, FILL, RESTORE, POS.to("meta")), ValueError, "pos is on meta, kept on cpu"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        scatter_fill(*args)


@pytest.mark.parametrize(("impl", "dtype"), [("triton", F32), ("cuda", F32), ("cpp", F64), ("cpp", F16)], ids=str)
def test_what_cannot_run_says_why(impl, dtype):
    with pytest.raises(KernelUnavailableError, match=f"scatter_fill: {impl} cannot run: "):
        scatter_fill(KEPT.to(dtype), FILL.to(dtype), RESTORE, POS.to(dtype), impl=impl)


@pytest.mark.parametrize(("dtype", "pos_dtype"), [(F16, F32), (F16, BF16), (F64, F32), (F32, F64)], ids=str)
def test_other_dtypes_run_somehow(dtype, pos_dtype):
    args = inputs(2, 20, 9, 24, dtype, pos_dtype)
    assert torch.equal(scatter_fill(*args), plainly(*args))
