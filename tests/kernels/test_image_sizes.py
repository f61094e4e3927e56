"""Images of another size are no reason to compile a kernel again."""

import pytest
from support.kernel_cases import triton_launches
from support.kernels import BF16, needs_compiler


@needs_compiler
@pytest.mark.parametrize("op", ["add_layer_norm", "bias_gelu", "layer_norm_gelu"])
def test_one_compilation_for_all_sizes(op):
    """Counts of rows that are 1, a multiple of 16 and neither: Triton by itself compiles each apart."""
    from support.aot import target

    compilations = []
    for batch, length in ((1, 16), (2, 48), (3, 35)):
        launches = triton_launches(op, batch=batch, length=length, channels=256, dtype=BF16)
        # The positions of an NCHW map decide how wide its loads can be.
        launches = [one for one in launches if "nchw" not in one.kernel.fn.__name__]
        assert launches
        with target(90):
            built = [one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants) for one in launches]
        compilations.append({one.hash for one in built})
    assert compilations[0] == compilations[1] == compilations[2]
