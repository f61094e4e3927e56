"""add_layer_norm's Triton kernels."""

import pytest
import torch
from block_ops import DTYPES, check_add_layer_norm

from mimdet.kernels.add_layer_norm import triton as kernels


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["scaled", "unscaled", "alone"])
def test_budget(dtypes, kind):
    check_add_layer_norm("triton", (3, 5, 48), dtypes, branch=kind != "alone", scale=kind == "scaled")


@pytest.mark.parametrize("channels", [1, 17, 31, 32, 33, 768, 1000])
def test_sizes_around_a_block(channels):
    check_add_layer_norm("triton", (2, 3, channels), DTYPES["fp32"], eps=1e-3)


def test_large_mean_and_small_deviation():
    check_add_layer_norm("triton", (1, 4, 1000), DTYPES["fp32"], branch=False, mean=1e3, std=0.1)


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["only-sum", "only-norm"])
def test_one_output_used(used):
    check_add_layer_norm("triton", (2, 3, 40), DTYPES["amp"], used=used)


@pytest.mark.parametrize("rows", [5, 6, 7, 13])
def test_programs_share_out_rows_unevenly(monkeypatch, rows):
    monkeypatch.setattr(kernels, "_PARTIALS", 3)
    check_add_layer_norm("triton", (1, rows, 8), DTYPES["fp32"])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=["no-samples", "no-tokens"])
def test_empty(shape):
    check_add_layer_norm("triton", shape, DTYPES["fp32"])


def test_repeats_bitwise():
    from block_ops import add_layer_norm_inputs, differentiate

    from mimdet.kernels.add_layer_norm.api import add_layer_norm

    inputs, gradients = add_layer_norm_inputs((2, 7, 40), DTYPES["fp32"])
    first, second = (
        differentiate(lambda **kw: add_layer_norm(**kw, impl="triton"), inputs, gradients) for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
