"""The Triton kernels of gather_add_pos under the interpreter."""

import pytest
import torch
from kernels_testing import Guarded, layouts, quantised

from mimdet.kernels.gather_add_pos import reference
from mimdet.kernels.gather_add_pos.api import gather_add_pos

F32, BF16 = torch.float32, torch.bfloat16


def inputs(batch, length, count, channels, x_dtype=F32, pos_dtype=F32):
    x = quantised(batch, length, channels, dtype=x_dtype)
    pos = quantised(length, channels, dtype=pos_dtype, seed=1) if pos_dtype else None
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(2)).argsort(dim=1)
    return x, pos, order[:, :count]


def forward_backward(function, x, pos, index, grad):
    x = x.detach().requires_grad_()
    pos = None if pos is None else pos.detach().requires_grad_()
    out = function(x, pos, index)
    return [out, *torch.autograd.grad(out, [x] if pos is None else [x, pos], grad.to(out.dtype))]


@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, None), (BF16, BF16), (BF16, F32)], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 9, 3, 255), (2, 9, 4, 256), (2, 9, 5, 257), (1, 1, 1, 1), (3, 5, 5, 17), (2, 6, 3, 768)], ids=str
)
def test_same_bits(shape, dtypes):
    args = inputs(*shape, *dtypes)
    grad = quantised(shape[0], shape[2], shape[3], dtype=dtypes[0], seed=5)
    got = forward_backward(lambda *a: gather_add_pos(*a, impl="triton"), *args, grad)
    want = forward_backward(reference.gather_add_pos, *args, grad)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(got[2:], want[2:], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "offset"])
def test_any_layout(layout):
    x, pos, index = inputs(2, 20, 9, 24)
    got = gather_add_pos(layouts(x)[layout], layouts(pos)[layout], layouts(index)[layout].int(), impl="triton")
    assert torch.equal(got, reference.gather_add_pos(x, pos, index))


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)], ids=["no-pictures", "nothing", "no-C"])
def test_empty(shape):
    x, pos, index = inputs(*shape)
    out = gather_add_pos(x.requires_grad_(), pos, index, impl="triton")
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("channels", [17, 255, 256])
def test_reads_and_writes_nothing_else(channels):
    made = [Guarded(t) for t in inputs(2, 9, 5, channels)]
    x, pos, index = (g.tensor for g in made)
    out = gather_add_pos(x.requires_grad_(), pos, index, impl="triton")
    assert out.isfinite().all()
    out.sum().backward()
    assert x.grad.isfinite().all()
    for guarded in made:
        guarded.check()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_two_to_the_31(tmp_path, index_dtype):
    # A sparse file: four gigabytes of addresses, a few kilobytes of disk. 32-bit products of row and stride wrap.
    step, last = 2**25, 64
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=step * last + 64, dtype=BF16)
    x = memory.as_strided((1, last + 1, 64), (0, step, 1))
    x[0, last], x[0, 0] = 3.0, 1.0
    out = gather_add_pos(x, None, torch.tensor([[0, last]], dtype=index_dtype), impl="triton")
    assert torch.equal(out, torch.tensor([[[1.0], [3.0]]]).expand(1, 2, 64).bfloat16())
