"""scatter_fill: one mask token for all, rows of 4 GiB, and wrong rows."""

import pytest
import torch
from support.kernel_cases import changed
from support.kernels import BF16, F32, IMPLS, quantized

from mimdet.kernels import sample_packed_tokens, scatter_fill, valid_mask
from mimdet.kernels.scatter_fill import ops
from mimdet.testing.op_cases import case

OP = "scatter_fill"
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_rows_as_one_image(impl):
    sizes, grid = [(2, 3), (4, 1)], (4, 3)
    sample = sample_packed_tokens(torch.rand(2, 12), sizes, grid, 0.5)
    tokens, pos = quantized(24, 8), quantized(24, 8, seed=1)
    kept, fill = tokens[sample.ids_keep][None], tokens[sample.ids_mask][None]
    out = scatter_fill(kept, fill, sample.ids_restore.view(1, -1), pos, impl=impl)
    valid = valid_mask(sizes, grid).view(1, 24, 1)
    assert torch.equal(out, torch.where(valid, tokens + pos, 0))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_mask_token_for_all(impl):
    example, token = case(OP), quantized(1, 1, 24, seed=7).requires_grad_()
    fill = token.expand(2, 3, 24)
    out = example(impl, fill=fill)
    assert torch.equal(out, example.plain(fill=fill))
    out.sum().backward()
    assert torch.equal(token.grad, torch.full_like(token, 6.0))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_rows_beyond_two_to_the_31(far_rows, runner, index_dtype):
    far_rows[0, -1] = 3.0
    length = far_rows.shape[1] + 1
    ids_restore = torch.arange(length, dtype=index_dtype)[None]
    pos = torch.zeros(1, 1, dtype=BF16).expand(length, 64)
    out = scatter_fill(far_rows, torch.ones(1, 1, 64, dtype=BF16), ids_restore, pos, impl=runner[0])
    assert torch.equal(out[0, -3:, 0], torch.tensor([0.0, 3.0, 1.0], dtype=BF16))


def with_rows(replaced, value, **sizes):
    """A case with another row in ids_restore, in place of the first ``replaced``; None takes one that is there."""
    example = case(OP, length=20, **sizes)
    ids_restore = example.others["ids_restore"].clone()
    place = int((ids_restore[1] == replaced).nonzero()[0])
    ids_restore[1, place] = ids_restore[1, place - 1] if value is None else value
    return changed(example, ids_restore=ids_restore)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, IndexError, r"ids_restore\[1, \d+\] is -1"),
        (20, IndexError, r"outside of 0 .. 19"),
        (None, ValueError, r"ids_restore\[1\] holds \d+ more than once"),
    ],
    ids=["negative", "too-large", "twice"],
)
def test_debug_mode_names_a_bad_row(monkeypatch, impl, value, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    case(OP)(impl)
    with pytest.raises(error, match=message):
        with_rows(5, value)(impl)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ((0, -1), ValueError, r"ids_restore\[1\] holds -1 more than 3 times"),
        ((-1, 4), ValueError, r"ids_restore\[1\] holds 4 more than once"),
        ((-1, -2), IndexError, r"is -2, outside of 0 .. 16"),
    ],
    ids=["too-much-padding", "too-little-padding", "below"],
)
def test_debug_mode_counts_padding(monkeypatch, change, error, message):
    monkeypatch.setenv("MIMDET_DEBUG_KERNELS", "1")
    case(OP, length=20, padded=True)("eager")
    with pytest.raises(error, match=message):
        with_rows(*change, padded=True)("eager")


@pytest.mark.parametrize("value", [-1, 20])
def test_cpp_never_reads_or_writes_outside(cpp, value):
    example = with_rows(5, value)
    message = f"ids_restore holds {value}, outside of 0 .. K \\+ F - 1 with K \\+ F = 20"
    with pytest.raises(RuntimeError, match=message):
        example("cpp")
    with pytest.raises(RuntimeError, match=f"ids_restore holds {value}"):
        ops.run_backward(torch.zeros(2, 20, 24), example.others["ids_restore"], 10, 10, F32, "cpp")


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
