"""Triton kernels of the feature map norms compiled for GPUs that are not here, at the stem's sizes and odd ones."""

import importlib
import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from kernels_aot import compile_for

# Registers a thread may take: 128 leaves room for 2 programs of 8 warps (4 of 4 warps) on a multiprocessor.
REGISTERS = 128
# dtype, (C, H, W), with sizes, compute capability: the ends of the stem and odd numbers, each dtype on each target.
CASES = {
    "stride2": (torch.bfloat16, (96, 400, 672), False, 90),
    "stride16": (torch.float32, (768, 60, 80), False, 80),
    "stride8-sizes": (torch.bfloat16, (384, 120, 160), True, 80),
    "stride4-sizes": (torch.float32, (192, 100, 168), True, 90),
    "odd-sizes": (torch.float32, (17, 11, 91), True, 90),
}


def compile_launches(monkeypatch, op, nhwc, dtype, shape, has_sizes, capability):
    """Every kernel that the launchers of forward and backward start, compiled instead of run."""
    kernels = importlib.import_module(f"mimdet.kernels.{op}.triton")
    made = []

    def start(kernel, grid):
        return lambda *arguments, **constants: made.append(compile_for(capability, kernel, *arguments, **constants))

    monkeypatch.setattr("triton.runtime.JITFunction.__getitem__", start)
    memory = torch.channels_last if nhwc else torch.contiguous_format
    dy, x, y = (torch.empty(1, *shape, dtype=dtype).contiguous(memory_format=memory) for _ in range(3))
    weight, bias = torch.empty(2, shape[0])
    statistics = torch.empty(2, 1, *(shape[1:] if op == "layer_norm_gelu" else ()))
    sizes = torch.ones(1, 2, dtype=torch.int32) if has_sizes else None
    getattr(kernels, f"launch_{op}_fwd")(x, weight, bias, sizes, 1e-6, nhwc, y, *statistics)
    getattr(kernels, f"launch_{op}_bwd")(dy, x, weight, bias, sizes, *statistics, nhwc, y, weight, bias)
    return made


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("op", "kernels"), [("group_norm_gelu", 5), ("layer_norm_gelu", 2)], ids=["group", "layer"])
def test_compiles_within_the_budget(monkeypatch, op, kernels, nhwc, case):
    made = compile_launches(monkeypatch, op, nhwc, *case)
    assert len(made) == kernels
    # Channel-major rows of another length start at any element: no 16-byte accesses there.
    aligned = (case[1][0] if nhwc else case[1][1] * case[1][2]) % 16 == 0
    # With sizes, neighbours in a row of positions need not be valid together.
    aligned &= nhwc or not case[2]
    for one in made:
        assert one.stack == 0, one
        assert one.registers <= REGISTERS, one
        if aligned and "combine" not in one.name:
            assert one.loads_16, one
            # These write a handful of numbers, not a map.
            assert one.stores_16 or "moments" in one.name or "sums" in one.name, one
