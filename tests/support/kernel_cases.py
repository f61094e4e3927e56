"""``mimdet.testing.op_cases``, and what needs pytest: parameters, and tests of all operations."""

import contextlib

import pytest
import torch
from support.kernels import PLACES, usable

from mimdet.kernels import OPS, dispatch
from mimdet.testing.op_cases import (
    BF16,
    DIFFERENTIABLE,
    DISCRETE,
    EPS,
    F16,
    F32,
    IMAGES,
    MIXING,
    NORMS,
    PACKED,
    Case,
    case,
    cotangents,
    differentiate,
    judge,
    lay_out,
    public,
    quantized,
    roi_align_levels,
)

__all__ = [
    "BF16",
    "DIFFERENTIABLE",
    "DISCRETE",
    "EPS",
    "F16",
    "F32",
    "IMAGES",
    "MIXING",
    "NORMS",
    "OPS",
    "PACKED",
    "Case",
    "assert_same_bits",
    "case",
    "cotangents",
    "differentiate",
    "judge",
    "lay_out",
    "on_runners",
    "pretend",
    "public",
    "quantized",
    "roi_align_levels",
    "runners",
    "triton_launches",
]


def assert_same_bits(first, second):
    """Two results of ``differentiate`` are equal, NaN included."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def runners(ops=OPS):
    """pytest parameters (op, impl, device): all implementations of ``ops`` that run on this machine, except eager."""
    places = {**PLACES, "aten_cpu": "cpu"} if "cpp" in PLACES else PLACES
    parameters = [
        pytest.param(op, impl, device, id=f"{op}-{impl}")
        for op in ops
        for impl, device in places.items()
        if usable(op, impl, device)
    ]
    return parameters or [pytest.param(None, None, None, marks=pytest.mark.skip(reason="neither a compiler nor a GPU"))]


def on_runners(ops=OPS):
    """Decorator: the test runs for every one of ``runners``."""
    return pytest.mark.parametrize(("op", "impl", "device"), runners(ops))


def triton_launches(op, length=12, channels=48, **sizes):
    """Launches that ``op``'s Triton kernels would make, forward and backward; images in both memory formats."""
    from support.aot import launches

    with pretend("triton", op), launches() as recorded:
        for layout in (None, "channels_last") if op in IMAGES else (None,):
            differentiate(case(op, length=length, channels=channels, layout=layout, **sizes), "triton")
    assert recorded
    return recorded


@contextlib.contextmanager
def pretend(impl, *ops):
    """Inside, ``impl`` of ``ops`` supports every call."""
    with pytest.MonkeyPatch.context() as patch:
        for op in ops:
            implementations = dispatch.operations()[op].implementations
            patch.setitem(implementations, impl, implementations[impl]._replace(supports=lambda call: None))
        dispatch.forget()
        yield
    dispatch.forget()
