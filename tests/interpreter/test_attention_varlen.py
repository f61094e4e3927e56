"""attention_varlen's Triton kernels."""

import pytest
import torch
from attention_ops import LENGTHS, check, cumulated, differentiate
from kernels_testing import layouts, quantised

from mimdet.kernels.attention_varlen import ops
from mimdet.kernels.attention_varlen import triton as kernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_budget(dtype):
    check("triton", LENGTHS, heads=1, dtype=dtype)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(5, F32), (16, F16), (64, BF16), (80, BF16), (128, F32)], ids=lambda v: str(v)
)
def test_head_dims(head_dim, dtype):
    check("triton", (33, 0, 5), head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "offset"])
def test_layouts(layout):
    check("triton", (5, 33), dtype=BF16, layout=lambda t: layouts(t)[layout])


def test_scale_and_a_longer_max_seqlen():
    check("triton", (5, 33), dtype=BF16, scale=0.5, max_seqlen=300)


@pytest.mark.parametrize(("dtype", "std"), [(F32, 4.0), (BF16, 12.0)], ids=["fp32", "bf16"])
def test_large_scores(dtype, std):
    """The interpreter rounds score * scale before it takes lse off, GPUs do not: not too large in float32."""
    check("triton", (5, 70), heads=1, dtype=dtype, std=std, each=False)


def test_rows_whose_exponentials_all_vanish_against_those_of_padding():
    """Scores near -1000: exp2(0 - lse) of a key that is not there is infinite."""
    qkv = torch.ones(35, 3, 1, 32)
    qkv[:, 1] = -30.0
    qkv[:, 2] = quantised(35, 1, 32)
    gradient = quantised(35, 1, 32, seed=1)
    got, want = (differentiate(qkv, gradient, (35,), impl) for impl in ("triton", "eager"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


def test_sequences_do_not_meet():
    qkv, gradient = quantised(80, 3, 1, 32), quantised(80, 1, 32)
    alone = differentiate(qkv[7:40], gradient[7:40], (33,), "triton")
    qkv[:7] = qkv[40:] = float("nan")
    among = differentiate(qkv, gradient, (7, 33, 40), "triton")
    assert all(torch.equal(among[name][7:40], value) for name, value in alone.items())


def test_separate_tensors_and_a_second_call_give_the_same_bits():
    qkv, gradient = quantised(38, 3, 2, 32), quantised(38, 2, 32)
    first, *others = (differentiate(qkv, gradient, (5, 0, 33), "triton", packed=p) for p in (True, True, False))
    assert all(torch.equal(other[name], value) for other in others for name, value in first.items())


@pytest.mark.parametrize("lengths", [(), (0, 0)], ids=["no-sequences", "empty-ones"])
def test_no_tokens(lengths):
    got = differentiate(torch.zeros(0, 3, 2, 8), torch.zeros(0, 2, 8), lengths, "triton", max_seqlen=0)
    assert got["out"].shape == (0, 2, 8)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "apart"])
def test_opcheck(packed):
    qkv, rest = quantised(9, 3, 2, 8), (cumulated((3, 0, 6)), 6, 0.5, "triton")
    tensors = (qkv, None, None) if packed else qkv.unbind(1)
    out, lse = ops.run(*tensors, *rest)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mimdet.attention_varlen.default, (*tensors, *rest), test_utils=checks)
    backward = torch.ops.mimdet.attention_varlen_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *tensors, out, lse, *rest), test_utils=checks)


def test_offsets_beyond_2_to_31():
    """Rows of q, k and v 2**30 numbers apart, in memory of which nothing but the rows is ever touched."""
    stride, rows = 2**30, quantised(3, 3, 1, 16, dtype=F16)
    memory = torch.UntypedStorage(2 * (2 * stride + 48))
    far = torch.tensor([], dtype=F16).set_(memory, 0, rows.shape, (stride, 16, 16, 1))
    far.copy_(rows)
    got, want = (ops.run(t, None, None, cumulated((3,)), 3, 0.25, "triton")[0] for t in (far, rows))
    assert torch.equal(got, want)


FAULTS = {
    "scale": ("launch_attention_varlen_fwd", lambda *a: (*a[:-1], a[-1] * 1.1)),
    "boundary off by one": (
        "launch_attention_varlen_fwd",
        lambda q, k, v, cu, *rest: (q, k, v, cu - (torch.arange(len(cu)) == 1).int(), *rest),
    ),
    "lse of another base": (
        "launch_attention_varlen_bwd",
        lambda g, q, k, v, out, lse, *rest: (g, q, k, v, out, lse * 0.6931, *rest),
    ),
    "delta of another output": (
        "launch_attention_varlen_bwd",
        lambda g, q, k, v, out, *rest: (g, q, k, v, out.flip(0), *rest),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(monkeypatch, fault):
    """The comparison itself: kernels that are given something wrong must fail it."""
    name, change = FAULTS[fault]
    right = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, lambda *arguments: right(*change(*arguments)))
    with pytest.raises(AssertionError, match="budget"):
        check("triton", (3, 17), heads=1, max_seqlen=18)
