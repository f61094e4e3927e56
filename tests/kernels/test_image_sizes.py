"""Images of another size are no reason to compile a kernel again."""

import pytest
from support.kernel_cases import triton_launches
from support.kernels import BF16, needs_compiler


@needs_compiler
@pytest.mark.parametrize(
    "op", ["add_layer_norm", "attention_varlen", "bias_gelu", "group_norm_gelu", "layer_norm_gelu"]
)
def test_one_compilation_for_all_sizes(op, monkeypatch):
    """Counts of rows that are 1, a multiple of 16 and neither: Triton by itself compiles each apart."""
    from support.aot import target
    from triton import knobs

    keys = {}

    def note(*, fn, compile, **_):
        keys.setdefault(fn.name, set()).add(compile["key"])
        return True  # nothing is compiled

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    # Triton asks the hook about what it has not compiled yet: no other test compiles for this target.
    with target(89):
        for batch, length in ((1, 16), (2, 48), (3, 35), (2, 1320), (1, 4096)):
            for one in triton_launches(op, batch=batch, length=length, channels=64, dtype=BF16):
                # The positions of an NCHW map decide how wide its loads can be.
                if "nchw" not in one.kernel.fn.__name__:
                    one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)
    assert keys
    assert all(len(of_kernel) == 1 for of_kernel in keys.values()), keys
