"""Triton kernels of the transformer blocks compiled for GPUs that are not here, at the model's sizes and odd ones."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from kernels_aot import compile_for

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": (F32, F32, F32), "bf16": (BF16, BF16, BF16), "amp": (F32, BF16, BF16)}
TARGETS = [80, 90]
# Registers a thread may take, in sizes of the model and in odd ones. A multiprocessor has 65536: at 128 threads a
# program, 48 leave room for 10 rows at a time and 80 for 6.
REGISTERS = {
    "_add_layer_norm_fwd_kernel": (40, 56),
    "_add_layer_norm_bwd_kernel": (80, 112),
    "_bias_gelu_fwd_kernel": (40, 56),
    "_bias_gelu_bwd_kernel": (40, 56),
}


def compile_add_layer_norm(capability, channels, dtypes):
    from mimdet.kernels.add_layer_norm import triton as kernels

    rows, length = 4200, 2100
    r, branch, y = (torch.empty(rows * channels, dtype=d) for d in dtypes)
    vector, row, block = torch.empty(channels), torch.empty(rows), kernels.triton.next_power_of_2(channels)
    options = {"HAS_BRANCH": True, "HAS_SCALE": True, "BLOCK_C": block, "num_warps": kernels._warps(block)}
    return [
        compile_for(
            capability, kernels._add_layer_norm_fwd_kernel, r, branch, row, vector, vector, r, y, row, row, length,
            channels, 1e-6, **options,
        ),
        compile_for(
            capability, kernels._add_layer_norm_bwd_kernel, r, y, r, row, row, row, vector, r, branch, vector, vector,
            rows, length, channels, 5, HAS_GRAD_R=True, **options,
        ),
    ]  # fmt: skip


def compile_bias_gelu(capability, channels, dtype):
    from mimdet.kernels.bias_gelu import triton as kernels

    rows, vector = 4200, torch.empty(channels)
    x, block = torch.empty(rows * channels, dtype=dtype), min(512, kernels.triton.next_power_of_2(channels))
    return [
        compile_for(
            capability, kernels._bias_gelu_fwd_kernel, x, vector, x, rows * channels, channels, BLOCK=1024, num_warps=4
        ),
        compile_for(
            capability, kernels._bias_gelu_bwd_kernel, x, x, vector, x, vector, rows, channels, ROWS=kernels._ROWS,
            BLOCK_C=block, num_warps=4,
        ),
    ]  # fmt: skip


def check(compiled, aligned):
    for made in compiled:
        assert made.stack == 0, made
        assert made.registers <= REGISTERS[made.name][not aligned], made
        if aligned:
            assert made.loads_16, made
            assert made.stores_16, made


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("channels", [768, 512, 1024, 1000, 17])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_add_layer_norm(capability, channels, dtypes):
    check(compile_add_layer_norm(capability, channels, dtypes), channels % 256 == 0)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("channels", [3072, 2048, 1000, 17])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
def test_bias_gelu(capability, channels, dtype):
    check(compile_bias_gelu(capability, channels, dtype), channels % 256 == 0)
