"""gather_add_pos: rows of 4 GiB, and wrong indices."""

import pytest
import torch
from support.kernel_cases import changed
from support.kernels import F32, IMPLS

from mimdet.kernels import gather_add_pos
from mimdet.kernels.gather_add_pos import ops
from mimdet.testing.op_cases import case

OP = "gather_add_pos"
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_two_to_the_31(far_rows, runner, index_dtype):
    last = far_rows.shape[1] - 1
    far_rows[0, last], far_rows[0, 0] = 3.0, 1.0
    out = gather_add_pos(far_rows, None, torch.tensor([[0, last]], dtype=index_dtype), impl=runner[0])
    assert torch.equal(out, torch.tensor([[[1.0], [3.0]]]).expand(1, 2, 64).bfloat16())


def with_index(value):
    """A case with another number in its index; None: one twice."""
    example = case(OP, length=20)
    index = example.others["index"].clone()
    index[1, 2] = index[1, 0] if value is None else value
    return changed(example, index=index)


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
    case(OP, length=20)(impl)
    with pytest.raises(error, match=message):
        with_index(value)(impl)


@pytest.mark.parametrize("value", [-1, 20])
def test_cpp_never_reads_outside(cpp, value):
    example = with_index(value)
    with pytest.raises(RuntimeError, match=f"index holds {value}, outside of 0 .. L - 1 with L = 20"):
        example("cpp")
    with pytest.raises(RuntimeError, match=f"index holds {value}"):
        ops.run_backward(torch.zeros(2, 10, 24), example.others["index"], 20, F32, "cpp")


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
