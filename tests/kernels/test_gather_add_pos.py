"""gather_add_pos: one rounding, so every implementation must give the reference's bits."""

import pytest
import torch
from support.kernels import BF16, F16, F32, IMPLS, Guarded, here, native, needs_compiler, quantized

from mimdet.kernels import gather_add_pos
from mimdet.kernels.gather_add_pos import ops, reference
from mimdet.testing import assert_within_budget

OP = "gather_add_pos"
F64 = torch.float64
SHAPES = here(
    [(2, 40, 20, 96), (1, 1, 1, 1), (3, 7, 7, 17), (2, 9, 4, 15), (2, 9, 4, 16), (2, 9, 5, 33), (2, 11, 1, 1000)],
    [(2, 9, 3, 255), (2, 9, 4, 256), (2, 9, 5, 257), (1, 1, 1, 1), (3, 5, 5, 17), (2, 6, 3, 768)],
)
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(batch, length, count, channels, x_dtype=F32, pos_dtype=F32):
    x = quantized(batch, length, channels, dtype=x_dtype)
    pos = quantized(length, channels, dtype=pos_dtype, seed=1) if pos_dtype else None
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return x, pos, order[:, :count]


def plainly(x, pos, index):
    rows = torch.stack([x[b, index[b]] for b in range(len(x))]) if len(x) else x[:, : index.shape[1]]
    return rows if pos is None else rows + pos[index]


def gradients(function, x, pos, index, grad):
    leaves = [x.detach().requires_grad_(), None if pos is None else pos.detach().requires_grad_()]
    out = function(*leaves, index)
    return torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype))


@pytest.mark.parametrize("pos_dtype", [F32, BF16, None], ids=["pos-f32", "pos-bf16", "no-pos"])
@pytest.mark.parametrize("x_dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_as_plain_indexing(runner, shape, x_dtype, pos_dtype):
    impl, device = runner
    x, pos, index = (None if t is None else t.to(device) for t in inputs(*shape, x_dtype, pos_dtype))
    expected = plainly(x, pos, index)
    assert torch.equal(gather_add_pos(x, pos, index, impl="eager"), expected)
    out = gather_add_pos(x, pos, index, impl=impl)
    assert torch.equal(out, expected)
    assert out.dtype == (torch.promote_types(x_dtype, pos_dtype) if pos_dtype else x_dtype)
    grad = quantized(shape[0], shape[2], shape[3], dtype=x_dtype, seed=5).to(device)
    actual = gradients(lambda *a: gather_add_pos(*a, impl=impl), x, pos, index, grad)
    same = gradients(reference.gather_add_pos, x, pos, index, grad)
    assert torch.equal(actual[0], same[0])
    if pos is not None:
        exact = gradients(reference.gather_add_pos, x.double(), pos.double(), index, grad)
        assert_within_budget(actual[1], same[1], exact[1], terms=shape[0], name="pos")


@native
@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=["x", "pos", "both"])
def test_only_the_required_gradients(cpp, which):
    x, pos, index = inputs(2, 30, 10, 8)
    x.requires_grad_(which[0]), pos.requires_grad_(which[1])
    gather_add_pos(x, pos, index, impl="cpp").sum().backward()
    counts = torch.zeros(2, 30).scatter_(1, index, 1.0)
    assert (x.grad is not None, pos.grad is not None) == which
    if which[0]:
        assert torch.equal(x.grad, counts[..., None].expand_as(x))
    if which[1]:
        assert torch.equal(pos.grad, counts.sum(0)[:, None].expand_as(pos))


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)], ids=["no-images", "nothing", "no-C"])
def test_empty(shape, runner):
    impl, device = runner
    x, pos, index = (t.to(device) for t in inputs(*shape))
    x.requires_grad_()
    out = gather_add_pos(x, pos, index, impl=impl)
    assert out.shape == (shape[0], shape[2], shape[3])
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_rows_of_a_feature_map_are_not_copied(cpp):
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
    # Tokens of three images as of one, each with its position.
    feature = quantized(3, 16, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    pos = quantized(60, 16, seed=1).requires_grad_()
    keep = torch.tensor([0, 7, 19, 20, 41, 59])
    tokens = feature.permute(0, 2, 3, 1).reshape(1, 60, 16)
    assert tokens.data_ptr() == feature.data_ptr()
    out = gather_add_pos(tokens, pos, keep[None], impl=impl)
    assert torch.equal(out[0], tokens[0, keep] + pos[keep])
    out.sum().backward()
    kept = torch.zeros(60).index_fill_(0, keep, 1.0)
    assert torch.equal(pos.grad, kept[:, None].expand(60, 16))
    assert torch.equal(feature.grad, kept.view(3, 1, 4, 5).expand(3, 16, 4, 5))


@pytest.mark.parametrize("channels", [15, 17, 255, 256])
def test_reads_and_writes_nothing_else(runner, channels):
    impl, device = runner
    guards = [Guarded(t.to(device)) for t in inputs(2, 20, 9, channels)]
    x, pos, index = (g.tensor for g in guards)
    x.requires_grad_(), pos.requires_grad_()
    out = gather_add_pos(x, pos, index, impl=impl)
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()
    for guarded in guards:
        guarded.check()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_two_to_the_31(far_rows, runner, index_dtype):
    last = far_rows.shape[1] - 1
    far_rows[0, last], far_rows[0, 0] = 3.0, 1.0
    out = gather_add_pos(far_rows, None, torch.tensor([[0, last]], dtype=index_dtype), impl=runner[0])
    assert torch.equal(out, torch.tensor([[[1.0], [3.0]]]).expand(1, 2, 64).bfloat16())


def test_gradcheck_of_the_reference():
    x, pos, index = inputs(2, 6, 3, 4, F64, F64)
    x.requires_grad_(), pos.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, pos: gather_add_pos(x, pos, index, impl="eager"), (x, pos))


@pytest.mark.parametrize("with_pos", [True, False], ids=["pos", "no-pos"])
def test_opcheck(cpp, with_pos):
    x, pos, index = inputs(2, 12, 5, 8)
    x.requires_grad_(), pos.requires_grad_()
    torch.library.opcheck(torch.ops.mimdet.gather_add_pos.default, (x, pos if with_pos else None, index, "cpp"))
    torch.library.opcheck(
        torch.ops.mimdet.gather_add_pos_backward.default, (quantized(2, 5, 8), index, 12, BF16, "cpp")
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_keeps_the_sum_in_float32(impl):
    x, pos, index = inputs(2, 20, 9, 24)
    x.requires_grad_()
    linear = torch.nn.Linear(24, 24)
    with torch.autocast("cpu", dtype=BF16):
        out = gather_add_pos(linear(x), pos, index, impl=impl)
        expected = plainly(linear(x), pos, index)
    assert out.dtype == F32
    assert torch.equal(out, expected)
    out.sum().backward()
    assert x.grad.isfinite().all()


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


@pytest.mark.parametrize("value", [-1, 20])
def test_cpp_never_reads_outside(cpp, value):
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
        ((X[0], POS, INDEX), ValueError, r"x must be \(B, L, C\), got \(5, 8\)"),
        ((X, POS, INDEX[0]), ValueError, r"index must be \(2, K\), got \(3,\)"),
        ((X, POS, INDEX[:1]), ValueError, r"index must be \(2, K\), got \(1, 3\)"),
        ((X, POS[:4], INDEX), ValueError, r"pos must be \(5, 8\), got \(4, 8\)"),
        ((X, POS[:, :7], INDEX), ValueError, r"pos must be \(5, 8\), got \(5, 7\)"),
        ((X, X, INDEX), ValueError, r"pos must be \(5, 8\), got \(2, 5, 8\)"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        gather_add_pos(*args)


@pytest.mark.parametrize(("x_dtype", "pos_dtype"), [(F16, F32), (F16, BF16), (F64, F32), (F32, F64)], ids=str)
def test_other_dtypes_run_eager(x_dtype, pos_dtype):
    x, pos, index = inputs(2, 20, 9, 24, x_dtype, pos_dtype)
    assert torch.equal(gather_add_pos(x, pos, index), plainly(x, pos, index))


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("channels", [768, 512, 17])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32), (F32, None)], ids=str)
def test_compiles_within_the_budget(capability, channels, dtypes):
    from support.aot import compile_pair

    x, pos, index = inputs(2, 4200, 2100, channels, *dtypes)
    grad = quantized(2, 2100, channels, dtype=dtypes[0])
    run = lambda: gradients(lambda *a: gather_add_pos(*a, impl="triton"), x, pos, index, grad)  # noqa: E731
    for one in compile_pair(OP, capability, run):
        assert one.stack == 0, one
        assert one.registers <= 64, one
        assert channels % 16 or (one.loads_16 and one.stores_16), one
