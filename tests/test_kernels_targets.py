"""Every Triton kernel that the launchers launch compiles for GPUs newer than, and other than, those it is tuned for."""

import importlib.util
import os

import pytest
from kernels_cases import triton_launches

from mimdet.kernels import OPS

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]


@pytest.mark.parametrize("target", [100, "gfx942"], ids=["sm_100", "gfx942"])
@pytest.mark.parametrize("op", OPS)
def test_compiles_without_spilling(op, target):
    from kernels_aot import compile_for

    for launch in triton_launches(op, length=48, channels=768):
        made = compile_for(target, launch.kernel, *launch.arguments, grid=launch.grid, **launch.constants)
        print(made)
        assert made.stack == 0, made
