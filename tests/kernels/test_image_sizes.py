"""Images of another size are no reason to compile a kernel again."""

import pytest
from support.kernels import BF16, needs_compiler

from mimdet.testing.op_cases import IMAGES, case, differentiate


@needs_compiler
@pytest.mark.parametrize(
    ("op", "lengths"),
    [(op, (16, 48, 35)) for op in ("add_layer_norm", "bias_gelu", "layer_norm_gelu")]
    # Maps of one part need no kernel that adds up parts.
    + [("group_norm_gelu", (1320, 1333, 1536, 10752)), ("attention_varlen", (77, 4096, 4200))],
    ids=str,
)
def test_one_compilation_for_all_sizes(op, lengths, monkeypatch):
    """Counts of rows that are 1, a multiple of 16 and neither: Triton by itself compiles each apart."""
    from support.aot import record, target
    from triton import knobs

    keys = {}

    def note(*, fn, compile, **_):
        keys.setdefault(fn.name, set()).add(compile["key"])
        return True  # nothing is compiled

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    # The positions of an NCHW map decide how wide its loads can be.
    layout = "channels_last" if op in IMAGES else None
    for batch, length in enumerate(lengths, 1):
        example = case(op, batch, length, channels=64, dtype=BF16, layout=layout)
        # Triton asks the hook about what it has not compiled yet: no other test compiles for this target.
        for one in record(op, lambda example=example: differentiate(example, "triton"), 89):
            with target(89):
                one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)
    assert keys
    assert all(len(of_kernel) == 1 for of_kernel in keys.values()), keys
