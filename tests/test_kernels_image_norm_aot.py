"""Triton kernels of the feature map norms compiled for GPUs that are not here, at the stem's sizes and odd ones."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from kernels_aot import compile_for

TARGETS = [80, 90]
# Registers a thread may take: 128 leaves room for 2 programs of 8 warps (4 of 4 warps) on a multiprocessor.
REGISTERS = 128


def group_norm(capability, dtype, nhwc, channels, positions):
    from mimdet.kernels.group_norm_gelu import triton as k

    size = channels * positions
    x, vector = torch.empty(16, dtype=dtype), torch.empty(channels)
    block_s, block_c = k._blocks(channels, nhwc)
    tile = {"NHWC": nhwc, "BLOCK_S": block_s, "BLOCK_C": block_c, "num_warps": 8 if nhwc else 4}
    half_s, half_c = k._blocks(channels, nhwc, k._TILE // 2)
    half = {**tile, "BLOCK_S": half_s, "BLOCK_C": half_c}
    tiles = 256 * (1 if nhwc else channels)
    return [
        compile_for(
            capability, k._group_norm_gelu_moments_kernel, x, vector, size, 256, 8192, BLOCK=k._TILE, num_warps=8
        ),
        compile_for(
            capability, k._group_norm_gelu_fwd_kernel, x, vector, vector, vector, x, vector, vector, channels,
            positions, tiles, 256, 8192, 1e-6, PARTS=256, **tile,
        ),
        compile_for(
            capability, k._group_norm_gelu_bwd_sums_kernel, x, x, vector, vector, vector, vector, vector, channels,
            positions, tiles, 3, **half,
        ),
        compile_for(
            capability, k._group_norm_gelu_bwd_dx_kernel, x, x, vector, vector, vector, vector, vector, x, channels,
            positions, tiles, **half,
        ),
        compile_for(
            capability, k._group_norm_gelu_bwd_combine_kernel, vector, vector, vector, vector, channels, positions,
            256, BLOCK_P=32, BLOCK_C=64, num_warps=4,
        ),
    ]  # fmt: skip


def layer_norm(capability, dtype, nhwc, channels, positions):
    from mimdet.kernels.layer_norm_gelu import triton as k

    x, vector = torch.empty(16, dtype=dtype), torch.empty(channels)
    six = (vector, vector, vector, vector)
    if nhwc:
        tile, half = k._row_blocks(channels), k._row_blocks(channels, k._TILE // 2)
        return [
            compile_for(
                capability, k._layer_norm_gelu_fwd_nhwc_kernel, x, vector, vector, x, vector, vector, positions,
                channels, 1e-6, **tile,
            ),
            compile_for(
                capability, k._layer_norm_gelu_bwd_nhwc_kernel, x, x, *six, x, vector, positions, channels, 3, **half
            ),
        ]  # fmt: skip
    tile = {"STEP_C": k._STEP_C, "BLOCK_P": k._BLOCK_P}
    return [
        compile_for(
            capability, k._layer_norm_gelu_fwd_nchw_kernel, x, vector, vector, x, vector, vector, channels, positions,
            1e-6, num_warps=4, **tile,
        ),
        compile_for(
            capability, k._layer_norm_gelu_bwd_nchw_kernel, x, x, *six, x, vector, channels, positions,
            num_warps=8, **tile,
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("capability", TARGETS, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("channels", "positions"), [(192, 67200), (768, 4200), (17, 1001)], ids=["stride4", "stride16", "odd"]
)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compile_op", [group_norm, layer_norm])
def test_compiles_within_the_budget(compile_op, dtype, nhwc, channels, positions, capability):
    # Channel-major rows of another length start at any element: no 16-byte accesses there.
    aligned = (channels if nhwc else positions) % 16 == 0
    for made in compile_op(capability, dtype, nhwc, channels, positions):
        print(made)
        assert made.stack == 0, made
        assert made.registers <= REGISTERS, made
        if aligned and "combine" not in made.name:
            assert made.loads_16, made
            # These write a handful of numbers, not a map.
            assert made.stores_16 or "moments" in made.name or "sums" in made.name, made
