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
        assert compiled.stack == 0, compiled
