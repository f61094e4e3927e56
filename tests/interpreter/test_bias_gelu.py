"""bias_gelu's Triton kernels."""

import pytest
import torch
from block_ops import check_bias_gelu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", [(3, 17), (2, 33, 48), (130, 96)], ids=str)
def test_budget(shape, dtype):
    check_bias_gelu("triton", shape, dtype)


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 511, 512, 513])
def test_sizes_around_a_block(channels):
    check_bias_gelu("triton", (5, channels), torch.float32)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_rows_around_a_program(rows):
    check_bias_gelu("triton", (rows, 24), torch.float32)


def test_empty():
    check_bias_gelu("triton", (0, 8), torch.float32)
