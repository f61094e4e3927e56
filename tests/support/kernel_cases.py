"""Tests of all operations: parameters for pytest, comparisons, and launches that are recorded."""

import contextlib

import pytest
import torch
from support.kernels import PLACES, Guarded, poisoned_allocations, usable

from mimdet.kernels import OPS, dispatch
from mimdet.testing.op_cases import IMAGES, case, cotangents, differentiate, judge


def assert_same_bits(first, second):
    """Two results of ``differentiate`` are equal, NaN included."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


def tensors_of(example):
    """All tensors of a case by name."""
    return {k: v for k, v in (example.inputs | example.others).items() if isinstance(v, torch.Tensor)}


def changed(example, **values):
    """A case with other inputs and arguments."""
    inputs = {k: values.get(k, v) for k, v in example.inputs.items()}
    return example._replace(inputs=inputs, others={k: values.get(k, v) for k, v in example.others.items()})


def check(example, impl, upstream=cotangents):
    """Outputs and gradients of ``impl`` are within the budget. New memory is NaN, and so is what surrounds the tensors
    and outputs' gradients, which must stay as they are. Returns outputs and gradients by name."""
    # Nothing can be copied into expanded tensors.
    guards = {k: Guarded(v) for k, v in tensors_of(example).items() if 0 not in v.stride() or not v.numel()}
    of_outputs = []

    def guarded(outputs):
        of_outputs.extend(Guarded(g) for g in upstream(outputs))
        return [g.tensor for g in of_outputs]

    inside = changed(example, **{k: g.tensor for k, g in guards.items()})
    with poisoned_allocations():
        actual = differentiate(inside, impl, guarded)
    for guard in (*guards.values(), *of_outputs):
        guard.check()
    judge(example, actual, upstream)
    return actual


def runners(ops=OPS, eager=False):
    """pytest parameters (op, impl, device): all implementations of ``ops`` that run on this machine; eager if asked."""
    places = {**PLACES, "aten_cpu": "cpu"} if "cpp" in PLACES else PLACES
    places = places | ({"eager": "cpu"} if eager and "cpp" in PLACES else {})
    parameters = [
        pytest.param(op, impl, device, id=f"{op}-{impl}")
        for op in ops
        for impl, device in places.items()
        if usable(op, impl, device)
    ]
    return parameters or [pytest.param(None, None, None, marks=pytest.mark.skip(reason="neither a compiler nor a GPU"))]


def on_runners(ops=OPS, eager=False):
    """Decorator: the test runs for every one of ``runners``."""
    return pytest.mark.parametrize(("op", "impl", "device"), runners(ops, eager))


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
