"""Every launched Triton kernel compiles for newer NVIDIA GPUs and for AMD's."""

import pytest
from support.kernel_cases import triton_launches
from support.kernels import needs_compiler

from mimdet.kernels import OPS


@needs_compiler
@pytest.mark.parametrize("target", [100, "gfx942"], ids=["sm_100", "gfx942"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spilling(op, target):
    from support.aot import compile_for

    for launch in triton_launches(op, length=48, channels=768):
        compiled = compile_for(target, launch.kernel, *launch.arguments, grid=launch.grid, **launch.constants)
        print(compiled)
        # ptxas keeps one number of the prologue in memory to have 48 registers.
        one_number = target == 100 and compiled.name == "_group_norm_gelu_bwd_sums_kernel"
        assert compiled.stack <= (8 if one_number else 0), compiled
