"""The Triton kernels of scatter_fill under the interpreter."""

import pytest
import torch
from kernels_testing import Guarded, layouts, quantised

from mimdet.kernels.scatter_fill import reference
from mimdet.kernels.scatter_fill.api import scatter_fill

F32, BF16 = torch.float32, torch.bfloat16


def inputs(batch, length, count, channels, dtype=F32, pos_dtype=F32, padding=0):
    restore = torch.rand(batch, length + padding, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    restore = torch.where(restore < length, restore, -1)
    kept = quantised(batch, count, channels, dtype=dtype)
    fill = quantised(batch, length - count, channels, dtype=dtype, seed=1)
    return kept, fill, restore, quantised(length + padding, channels, dtype=pos_dtype, seed=3)


def forward_backward(function, kept, fill, restore, pos, grad):
    wanted = [t.detach().requires_grad_() for t in (kept, fill, pos)]
    out = function(*wanted[:2], restore, wanted[2])
    return [out, *torch.autograd.grad(out, wanted, grad.to(out.dtype))]


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 7, 3, 255), (2, 7, 4, 256), (2, 7, 5, 257), (1, 1, 1, 1), (3, 5, 4, 17), (2, 6, 3, 512)],
    ids=str,
)
def test_same_bits(shape, dtypes):
    args = inputs(*shape, *dtypes)
    grad = quantised(shape[0], shape[1], shape[3], dtype=dtypes[0], seed=5)
    got = forward_backward(lambda *a: scatter_fill(*a, impl="triton"), *args, grad)
    want = forward_backward(reference.scatter_fill, *args, grad)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got[3], want[3], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 9, 4, 24), (1, 5, 0, 257)], ids=str)
def test_padding_is_zeros_without_gradient(shape):
    args = inputs(*shape, padding=3)
    grad = quantised(shape[0], shape[1] + 3, shape[3], seed=5)
    got = forward_backward(lambda *a: scatter_fill(*a, impl="triton"), *args, grad)
    want = forward_backward(reference.scatter_fill, *args, grad)
    for a, b in zip(got[:3], want[:3], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got[3], want[3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
def test_any_layout(layout):
    kept, fill, restore, pos = inputs(2, 20, 9, 24)
    laid_out = [layouts(t)[layout] for t in (kept, fill, restore.int(), pos)]
    assert torch.equal(scatter_fill(*laid_out, impl="triton"), reference.scatter_fill(kept, fill, restore, pos))


def test_one_mask_token_for_all():
    kept, _, restore, pos = inputs(2, 20, 9, 24)
    fill = quantised(1, 1, 24, seed=7).expand(2, 11, 24)
    want = reference.scatter_fill(kept, fill, restore, pos)
    assert torch.equal(scatter_fill(kept, fill, restore, pos, impl="triton"), want)


@pytest.mark.parametrize(
    "shape",
    [(0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 5, 8), (2, 5, 3, 0)],
    ids=["no-pictures", "all-filled", "all-kept", "no-D"],
)
def test_empty_parts(shape):
    args = inputs(*shape)
    args[0].requires_grad_(), args[1].requires_grad_()
    out = scatter_fill(*args, impl="triton")
    assert torch.equal(out, reference.scatter_fill(*args))
    out.sum().backward()
    assert torch.equal(args[0].grad, torch.ones_like(args[0]))
    assert torch.equal(args[1].grad, torch.ones_like(args[1]))


@pytest.mark.parametrize("channels", [17, 255, 256])
def test_reads_and_writes_nothing_else(channels):
    made = [Guarded(t) for t in inputs(2, 9, 5, channels)]
    kept, fill, restore, pos = (g.tensor for g in made)
    out = scatter_fill(kept.requires_grad_(), fill.requires_grad_(), restore, pos, impl="triton")
    assert out.isfinite().all()
    out.sum().backward()
    assert kept.grad.isfinite().all()
    assert fill.grad.isfinite().all()
    for guarded in made:
        guarded.check()


def test_rows_beyond_two_to_the_31(tmp_path):
    # A sparse file: four gigabytes of addresses, a few kilobytes of disk. 32-bit products of row and stride wrap.
    step, last = 2**25, 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step * last + 64, dtype=BF16)
    kept = memory.as_strided((1, last + 1, 64), (0, step, 1))
    kept[0, last] = 3.0
    restore = torch.arange(last + 2, dtype=torch.int32)[None]
    pos = torch.zeros(1, 1, dtype=BF16).expand(last + 2, 64)
    out = scatter_fill(kept, torch.ones(1, 1, 64, dtype=BF16), restore, pos, impl="triton")
    assert torch.equal(out[0, -3:, 0], torch.tensor([0.0, 3.0, 1.0], dtype=BF16))
