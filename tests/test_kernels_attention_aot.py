"""Triton's attention kernels compiled for GPUs that are not here, at the model's head dims."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from kernels_aot import compile_for

from mimdet.kernels.attention_varlen import triton as kernels

F32, BF16 = torch.float32, torch.bfloat16
# What a program may use of shared memory: 99 KiB is what the smallest GPUs of compute capability 8.x have.
SHARED = 99 * 1024
TOTAL, TILES = 4200, 33
# Bytes of spilled registers. float32 at the widest head, which the model has not, cannot do entirely without.
SPILLED = {("q", F32, 128): 24}


def arguments(name, dtype, head_dim):
    """(kernel, arguments, constants) of one launch, over a packed qkv of 768 channels."""
    x, f, cu_seqlens = torch.empty(16, dtype=dtype), torch.empty(16), torch.empty(4, dtype=torch.int32)
    heads = 768 // head_dim
    dense, packed = (768, head_dim), (3 * 768, head_dim)
    if name == "fwd":
        options = kernels._options(kernels._FWD, dtype, head_dim) | {"SPLIT": dtype != F32}
        inputs = (x, x, x, cu_seqlens, x, f, *packed * 3, 768, TOTAL, heads, TILES, 0.25)
        return kernels._attention_varlen_fwd_kernel, inputs, options
    if name == "delta":
        options = {"D": head_dim, "BLOCK_D": kernels._options(kernels._FWD, dtype, head_dim)["BLOCK_D"], "BLOCK_M": 64}
        return kernels._attention_varlen_delta_kernel, (x, x, f, *dense, 768, TOTAL, heads), options
    inputs, rest = (x, x, x, x, cu_seqlens, f, f), (*dense, *packed * 3, 3 * 768, TOTAL, heads, TILES, 0.25, 0.18)
    if name == "kv":
        options = kernels._options(kernels._BWD_KV, dtype, head_dim)
        return kernels._attention_varlen_bwd_kv_kernel, (*inputs, x, x, *rest), options
    options = kernels._options(kernels._BWD_Q, dtype, head_dim)
    return kernels._attention_varlen_bwd_q_kernel, (*inputs, x, *rest), options


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["fwd", "delta", "kv", "q"])
def test_resources(capability, head_dim, dtype, name):
    kernel, inputs, options = arguments(name, dtype, head_dim)
    made = compile_for(capability, kernel, *inputs, **options)
    assert made.stack <= SPILLED.get((name, dtype, head_dim), 0), made
    assert made.shared <= SHARED, made
    # A multiprocessor has 65536 registers; one program at least must find room.
    assert made.registers * 32 * options.get("num_warps", 4) <= 65536, made
    assert made.loads_16, made
    assert made.stores_16 or name == "delta", made
