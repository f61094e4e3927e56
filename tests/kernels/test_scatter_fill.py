"""scatter_fill: one rounding, so every implementation must give the reference's bits."""

import pytest
import torch
from support.kernels import BF16, F16, F32, IMPLS, Guarded, here, native, needs_compiler, quantized

from mimdet.kernels import sample_packed_tokens, scatter_fill, valid_mask
from mimdet.kernels.scatter_fill import ops
from mimdet.testing import assert_within_budget

OP = "scatter_fill"
F64 = torch.float64
SHAPES = here(
    [(2, 40, 20, 96), (1, 1, 1, 1), (3, 7, 6, 17), (2, 9, 4, 15), (2, 9, 4, 16), (2, 9, 5, 33), (2, 11, 1, 1000)],
    [(2, 7, 3, 255), (2, 7, 4, 256), (2, 7, 5, 257), (1, 1, 1, 1), (3, 5, 4, 17), (2, 6, 3, 512)],
)
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(batch, length, count, channels, dtype=F32, pos_dtype=F32, padding=0):
    ids_restore = torch.rand(batch, length + padding, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    ids_restore = torch.where(ids_restore < length, ids_restore, -1)
    kept = quantized(batch, count, channels, dtype=dtype)
    fill = quantized(batch, length - count, channels, dtype=dtype, seed=1)
    return kept, fill, ids_restore, quantized(length + padding, channels, dtype=pos_dtype, seed=3)


def plainly(kept, fill, ids_restore, pos):
    rows = torch.cat([kept, fill], dim=1)
    out = rows.gather(1, ids_restore.clamp(min=0).unsqueeze(-1).expand(-1, -1, rows.shape[-1])) + pos
    return torch.where((ids_restore < 0)[..., None], 0, out)


def gradients(function, kept, fill, ids_restore, pos, grad):
    leaves = [t.detach().requires_grad_() for t in (kept, fill, pos)]
    out = function(*leaves[:2], ids_restore, leaves[2])
    return torch.autograd.grad(out, leaves, grad.to(out.dtype))


def check(runner, args, grad):
    """Output and gradients of both sources have the reference's bits; pos's is within the budget."""
    impl, device = runner
    args, grad = [t.to(device) for t in args], grad.to(device)
    for word in ("eager", impl):
        assert torch.equal(scatter_fill(*args, impl=word), plainly(*args)), word
    actual = gradients(lambda *a: scatter_fill(*a, impl=impl), *args, grad)
    same = gradients(plainly, *args, grad)
    exact = gradients(plainly, *(t if t is args[2] else t.double() for t in args), grad)
    assert torch.equal(actual[0], same[0])
    assert torch.equal(actual[1], same[1])
    assert_within_budget(actual[2], same[2], exact[2], terms=len(args[0]), name="pos")


@pytest.mark.parametrize("pos_dtype", [F32, BF16], ids=["pos-f32", "pos-bf16"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_concatenation(runner, shape, dtype, pos_dtype):
    args = inputs(*shape, dtype, pos_dtype)
    assert scatter_fill(*args).dtype == torch.promote_types(dtype, pos_dtype)
    check(runner, args, quantized(shape[0], shape[1], shape[3], dtype=dtype, seed=5))


@pytest.mark.parametrize("shape", [(2, 20, 9, 24), (1, 7, 7, 17), (3, 5, 0, 16)], ids=str)
def test_padding_is_zeros_without_gradient(runner, shape):
    check(runner, inputs(*shape, padding=6), quantized(shape[0], shape[1] + 6, shape[3], seed=5))


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_rows_as_one_image(impl):
    sizes, grid = [(2, 3), (4, 1)], (4, 3)
    sample = sample_packed_tokens(torch.rand(2, 12), sizes, grid, 0.5)
    tokens, pos = quantized(24, 8), quantized(24, 8, seed=1)
    kept, fill = tokens[sample.ids_keep][None], tokens[sample.ids_mask][None]
    out = scatter_fill(kept, fill, sample.ids_restore.view(1, -1), pos, impl=impl)
    valid = valid_mask(sizes, grid).view(1, 24, 1)
    assert torch.equal(out, torch.where(valid, tokens + pos, 0))


@native
@pytest.mark.parametrize("differentiable", [(0,), (1,), (3,), (0, 1), (0, 1, 3)], ids=str)
def test_only_the_required_gradients(cpp, differentiable):
    args = inputs(2, 30, 10, 8)
    for i in differentiable:
        args[i].requires_grad_()
    scatter_fill(*args, impl="cpp").sum().backward()
    for i in (0, 1, 3):
        if i in differentiable:
            assert torch.equal(args[i].grad, torch.full_like(args[i], 2.0 if i == 3 else 1.0))
        else:
            assert args[i].grad is None


@pytest.mark.parametrize(
    "shape",
    [(0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 5, 8), (2, 5, 3, 0)],
    ids=["no-images", "all-filled", "all-kept", "no-D"],
)
def test_empty_parts(runner, shape):
    check(runner, inputs(*shape), quantized(shape[0], shape[1], shape[3], seed=5))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_mask_token_for_all(impl):
    kept, _, ids_restore, pos = inputs(2, 20, 9, 24)
    token = quantized(1, 1, 24, seed=7).requires_grad_()
    fill = token.expand(2, 11, 24)
    out = scatter_fill(kept, fill, ids_restore, pos, impl=impl)
    assert torch.equal(out, plainly(kept, fill, ids_restore, pos))
    out.sum().backward()
    assert torch.equal(token.grad, torch.full_like(token, 22.0))


@pytest.mark.parametrize("impl", IMPLS)
def test_positions_with_a_leading_one_and_int32(impl):
    kept, fill, ids_restore, pos = inputs(2, 20, 9, 24)
    out = scatter_fill(kept, fill, ids_restore.int(), pos[None], impl=impl)
    assert torch.equal(out, plainly(kept, fill, ids_restore, pos))


@pytest.mark.parametrize("channels", [15, 17, 255, 256])
def test_reads_and_writes_nothing_else(runner, channels):
    impl, device = runner
    guards = [Guarded(t.to(device)) for t in inputs(2, 20, 9, channels)]
    kept, fill, ids_restore, pos = (g.tensor for g in guards)
    for t in (kept, fill, pos):
        t.requires_grad_()
    out = scatter_fill(kept, fill, ids_restore, pos, impl=impl)
    assert out.isfinite().all()
    out.sum().backward()
    assert kept.grad.isfinite().all()
    assert fill.grad.isfinite().all()
    for guarded in guards:
        guarded.check()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_two_to_the_31(far_rows, runner, index_dtype):
    far_rows[0, -1] = 3.0
    length = far_rows.shape[1] + 1
    ids_restore = torch.arange(length, dtype=index_dtype)[None]
    pos = torch.zeros(1, 1, dtype=BF16).expand(length, 64)
    out = scatter_fill(far_rows, torch.ones(1, 1, 64, dtype=BF16), ids_restore, pos, impl=runner[0])
    assert torch.equal(out[0, -3:, 0], torch.tensor([0.0, 3.0, 1.0], dtype=BF16))


def test_gradcheck_of_the_reference():
    kept, fill, ids_restore, pos = inputs(2, 6, 3, 4, F64, F64)
    floats = [t.requires_grad_() for t in (kept, fill, pos)]
    assert torch.autograd.gradcheck(lambda k, f, p: scatter_fill(k, f, ids_restore, p, impl="eager"), floats)


@pytest.mark.parametrize("padding", [0, 3])
def test_opcheck(cpp, padding):
    kept, fill, ids_restore, pos = inputs(2, 12, 5, 8, padding=padding)
    for t in (kept, fill, pos):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.mimdet.scatter_fill.default, (kept, fill, ids_restore, pos, "cpp"))
    torch.library.opcheck(
        torch.ops.mimdet.scatter_fill_backward.default, (quantized(2, 12 + padding, 8), ids_restore, 5, 7, BF16, "cpp")
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_keeps_the_sum_in_float32(impl):
    kept, fill, ids_restore, pos = inputs(2, 20, 9, 24)
    linear = torch.nn.Linear(24, 24)
    with torch.autocast("cpu", dtype=BF16):
        out = scatter_fill(linear(kept), linear(fill), ids_restore, pos, impl=impl)
        expected = plainly(linear(kept), linear(fill), ids_restore, pos)
    assert out.dtype == F32
    assert torch.equal(out, expected)
    out.sum().backward()
    assert linear.weight.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, IndexError, r"ids_restore\[1, 2\] is -1"),
        (20, IndexError, r"outside of 0 .. 19"),
        (None, ValueError, r"ids_restore\[1\] holds \d+ more than once"),
    ],
    ids=["negative", "too-large", "twice"],
)
def test_debug_mode_names_a_bad_row(monkeypatch, impl, value, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    kept, fill, ids_restore, pos = inputs(2, 20, 9, 24)
    scatter_fill(kept, fill, ids_restore, pos, impl=impl)
    ids_restore[1, 2] = ids_restore[1, 0] if value is None else value
    with pytest.raises(error, match=message):
        scatter_fill(kept, fill, ids_restore, pos, impl=impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((0, -1), ValueError, r"ids_restore\[1\] holds -1 more than 3 times"),
        ((-1, 4), ValueError, r"ids_restore\[1\] holds 4 more than once"),
        ((-1, -2), IndexError, r"is -2, outside of 0 .. 11"),
    ],
    ids=["too-much-padding", "too-little-padding", "below"],
)
def test_debug_mode_counts_padding(monkeypatch, change, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    kept, fill, ids_restore, pos = inputs(2, 12, 5, 8, padding=3)
    scatter_fill(kept, fill, ids_restore, pos)
    ids_restore[1, (ids_restore[1] == change[0]).nonzero()[0]] = change[1]
    with pytest.raises(error, match=message):
        scatter_fill(kept, fill, ids_restore, pos)


@pytest.mark.parametrize("value", [-1, 20])
def test_cpp_never_reads_or_writes_outside(cpp, value):
    kept, fill, ids_restore, pos = inputs(2, 20, 9, 24)
    ids_restore[1, 2] = value
    message = f"ids_restore holds {value}, outside of 0 .. K \\+ F - 1 with K \\+ F = 20"
    with pytest.raises(RuntimeError, match=message):
        scatter_fill(kept, fill, ids_restore, pos, impl="cpp")
    with pytest.raises(RuntimeError, match=f"ids_restore holds {value}"):
        ops.run_backward(torch.zeros(2, 20, 24), ids_restore, 9, 11, F32, "cpp")


KEPT, FILL, POS = torch.zeros(2, 3, 8), torch.zeros(2, 2, 8), torch.zeros(5, 8)
IDS_RESTORE = torch.arange(5).repeat(2, 1)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((KEPT, FILL.bfloat16(), IDS_RESTORE, POS), TypeError, "kept and fill must have one dtype"),
        ((KEPT[0], FILL, IDS_RESTORE, POS), ValueError, r"kept must be \(B, K, D\), got \(3, 8\)"),
        ((KEPT, FILL[0], IDS_RESTORE, POS), ValueError, r"fill must be \(2, F, 8\), got \(2, 8\)"),
        ((KEPT, FILL[..., :7], IDS_RESTORE, POS), ValueError, r"fill must be \(2, F, 8\), got \(2, 2, 7\)"),
        ((KEPT, FILL[:1], IDS_RESTORE, POS), ValueError, r"fill must be \(2, F, 8\), got \(1, 2, 8\)"),
        ((KEPT, FILL, IDS_RESTORE[:, :4], POS), ValueError, r"ids_restore must be \(2, 5 or more\), got \(2, 4\)"),
        ((KEPT, FILL, IDS_RESTORE, POS[:4]), ValueError, r"pos must be \(5, 8\), got \(4, 8\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        scatter_fill(*args)


@pytest.mark.parametrize(("dtype", "pos_dtype"), [(F16, F32), (F16, BF16), (F64, F32), (F32, F64)], ids=str)
def test_other_dtypes_run_eager(dtype, pos_dtype):
    args = inputs(2, 20, 9, 24, dtype, pos_dtype)
    assert torch.equal(scatter_fill(*args), plainly(*args))


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("channels", [768, 512, 17])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_compiles_within_the_budget(capability, channels, dtypes):
    from support.aot import compile_pair

    args = inputs(2, 4200, 2100, channels, *dtypes)
    grad = quantized(2, 4200, channels, dtype=dtypes[0])
    for one in compile_pair(
        OP, capability, lambda: gradients(lambda *a: scatter_fill(*a, impl="triton"), *args, grad)
    ):  # fmt: skip
        assert one.stack == 0, one
        assert one.registers <= 80, one
        assert channels % 16 or (one.loads_16 and one.stores_16), one
