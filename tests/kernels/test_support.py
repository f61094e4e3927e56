"""The checks themselves; test_operations.py has wrong results of every operation."""

import pytest
import torch
from support.kernels import Guarded, layouts, poisoned_allocations, quantized

from mimdet.testing import assert_within_budget


def test_budget_catches_wrong_dtype_and_shape():
    x = quantized(4, 4)
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        assert_within_budget(x.bfloat16(), x, x.double())
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(x[:2], x, x.double())


def test_poison_reaches_every_allocator_and_leaves_no_trace():
    plain = torch.empty
    like = torch.zeros(3)
    with poisoned_allocations():
        tensors = [torch.empty(3), torch.empty_like(like), torch.empty_strided((3,), (1,)), like.new_empty(3)]
        assert all(m.isnan().all() for m in tensors)
        assert torch.empty(2, dtype=torch.int32).eq(2**31 - 1).all()
    assert torch.empty is plain


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "offset"])
def test_guard_sees_writes_around_and_inside(layout):
    x = layouts(quantized(2, 3, 4, 5))[layout]
    guarded = Guarded(x)
    assert torch.equal(guarded.tensor, x)
    assert guarded.tensor.stride() == x.stride()
    guarded.check()
    guarded.memory[Guarded.BAND - 1] = 0.0
    with pytest.raises(AssertionError, match="was written"):
        guarded.check()
    guarded = Guarded(x)
    guarded.tensor.flatten(0)
    guarded.tensor[0, 0, 0, 0] += 1
    with pytest.raises(AssertionError, match="was written"):
        guarded.check()


def test_guard_poisons_reads_past_the_end():
    guarded = Guarded(quantized(4, 8))
    past = guarded.memory[Guarded.BAND + 32 : Guarded.BAND + 33]
    assert past.isnan().all()
