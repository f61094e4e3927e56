"""Every form of every operation under pytest-benchmark, for work on one of them; figures to publish come from
``mimdet bench ops``, which measures the forms in turn.

pytest tests/benchmark_ops.py --benchmark-only [-k "bias_gelu and forward"] [--benchmark-autosave, --benchmark-compare]

The name keeps it out of ``pytest``'s own collection. A form that is wrong fails before it is timed.
"""

import pytest
import torch

from mimdet.bench.cases import OPS, cases
from mimdet.bench.ops import DIRECTIONS, Options, check_forms, forms_of, run_of, settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = ("fp32", "bf16") if DEVICE == "cuda" else ("fp32",)
SIZE = (800, 1344) if DEVICE == "cuda" else (480, 640)


def parameters():
    """(case, direction, form) for all that the model does on this machine."""
    options = Options(DEVICE, output=None)
    made = {(c.op, c.name, c.dtype): c for op in OPS for dtype in DTYPES for c in cases(op, dtype, *SIZE, (1,))}
    return [
        pytest.param(case, direction, name, id=f"{case.op}-{case.name}-{case.dtype}-{direction}-{name}")
        for case in made.values()
        for direction in DIRECTIONS
        if direction in case.moved
        for name in forms_of(case, options)
    ]


@pytest.mark.parametrize(("case", "direction", "name"), parameters())
def test_operation(benchmark, case, direction, name):
    form = forms_of(case, Options(DEVICE, output=None))[name]
    inputs = case.make(DEVICE)
    with settings():
        gradients, faults = check_forms(case, {name: form}, inputs)
        if faults:
            pytest.fail(faults[name])
        run = run_of(form, inputs, case, gradients, direction)
        benchmark.group = f"{case.op} {case.name} {'x'.join(map(str, case.shape))} {case.dtype} {direction}"
        benchmark(run if DEVICE == "cpu" else lambda: (run(), torch.cuda.synchronize()))
