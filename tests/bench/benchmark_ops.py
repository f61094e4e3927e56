"""Every implementation of every operation under pytest-benchmark, for work on one of them; figures to publish come from
``mimdet bench ops``, which measures them in turn.

pytest tests/bench/benchmark_ops.py --benchmark-only [-k "bias_gelu and forward"] [--benchmark-autosave]

The name keeps it out of ``pytest``'s own collection. What is wrong fails before it is timed.
"""

import pytest
import torch

from mimdet.bench.cases import OPS, cases
from mimdet.bench.experiments.ops import DIRECTIONS, Options, check, implementations_of, run_of, settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("fp32", "bf16") if DEVICE == "cuda" else ("fp32",)
SIZE = (800, 1344) if DEVICE == "cuda" else (480, 640)


def parameters():
    """(case, direction, implementation) of every operation on this machine."""
    options = Options(device=DEVICE)
    unique = {(c.op, c.name, c.dtype): c for op in OPS for dtype in DTYPES for c in cases(op, dtype, *SIZE, (1,))}
    return [
        pytest.param(case, direction, name, id=f"{case.op}-{case.name}-{case.dtype}-{direction}-{name}")
        for case in unique.values()
        for direction in DIRECTIONS
        if direction in case.moved
        for name in implementations_of(case, options)
    ]


@pytest.mark.parametrize(("case", "direction", "name"), parameters())
def test_operation(benchmark, case, direction, name):
    function = implementations_of(case, Options(device=DEVICE))[name]
    inputs = case.make(DEVICE)
    with settings():
        gradients, errors = check(case, {name: function}, inputs)
        if errors:
            pytest.fail(errors[name])
        run = run_of(function, inputs, case, gradients, direction)
        benchmark.group = f"{case.op} {case.name} {'x'.join(map(str, case.shape))} {case.dtype} {direction}"
        benchmark(run if DEVICE == "cpu" else lambda: (run(), torch.cuda.synchronize()))
