"""Direct calls give the registered operation's numbers, and torch's dispatcher is used wherever it is observed."""

import sys
from pathlib import Path

import pytest
import torch
from support.kernel_cases import assert_same_bits
from support.paths import ROOT
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mimdet.kernels import OPS, build, library
from mimdet.testing.op_cases import DIFFERENTIABLE, case, differentiate, public

pytestmark = pytest.mark.skipif(bool(build.cpp_unavailable()), reason="no C++ kernels here")


class Names(TorchDispatchMode):
    """Names of the operations that were called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_same_numbers_on_both_ways(op):
    example = case(op)
    short = differentiate(example, "cpp")
    with Names() as names:
        registered = differentiate(example, "cpp")
    assert f"mimdet::{op}" in names.seen
    assert any(name == f"mimdet::{op}_backward" for name in names.seen)
    assert_same_bits(short, registered)


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_dispatched_without_an_observer(op, monkeypatch):
    example, called = case(op), []
    public(op)  # registers it
    overload = type(getattr(torch.ops.mimdet, op).default)
    original = overload.__call__
    monkeypatch.setattr(
        overload, "__call__", lambda self, *a, **k: (called.append(self.name()), original(self, *a, **k))[1]
    )
    with torch.no_grad():
        example("cpp")
    assert not [name for name in called if name.startswith("mimdet::")]


def test_fake_tensors_and_transforms_see_the_operation():
    with FakeTensorMode() as mode:
        x, bias = (mode.from_tensor(torch.ones(n, 8)) for n in (3, 1))
        assert public("bias_gelu")(x, bias[0], impl="cpp").shape == (3, 8)
    gradient = torch.func.grad(lambda x: public("bias_gelu")(x, torch.zeros(8), impl="cpp").sum())
    with pytest.raises(RuntimeError, match="functorch transforms"):
        # Registered operations have no functorch rule: an error, not a wrong result.
        torch.func.vmap(gradient)(torch.ones(2, 3, 8))


def test_second_derivatives_are_refused():
    x = torch.ones(3, 8, requires_grad=True)
    y = public("bias_gelu")(x, torch.zeros(8), impl="cpp")
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


def test_two_ways_give_one_choice():
    """The registered operation refuses an unknown implementation."""
    with pytest.raises(ValueError, match="bias_gelu: 'fast' is not an implementation"):
        torch.ops.mimdet.bias_gelu(torch.ones(3, 8), torch.zeros(8), "fast")


# Python functions of kernels/ that a call enters, forward and backward, from the public function to the launches.
MOST_FUNCTIONS = {
    "add_layer_norm": 19,
    "attention_varlen": 18,
    "batch_norm": 51,
    "bias_gelu": 16,
    "gather_add_pos": 23,
    "group_norm_gelu": 32,
    "layer_norm_gelu": 32,
    "match_boxes": 22,
    "nms_slots": 11,
    "rasterize_polygons": 12,
    "roi_align_levels": 41,
    "sample_tokens": 16,
    "scatter_fill": 27,
}


@pytest.mark.parametrize("op", OPS)
def test_a_call_enters_few_python_functions(op, monkeypatch):
    """Each costs about as much as a check of an argument; there are hundreds of calls a step."""
    monkeypatch.setattr(library, "launch", lambda *arguments, **keywords: None)
    example, entered = case(op), []
    differentiate(example, None)

    def notice(frame, event, _):
        file = Path(frame.f_code.co_filename).resolve()
        entered.extend([frame.f_code.co_name] * (event == "call" and file.is_relative_to(ROOT / "kernels")))

    sys.setprofile(notice)
    try:
        differentiate(example, None)
    finally:
        sys.setprofile(None)
    assert 0 < len(entered) <= MOST_FUNCTIONS[op], entered


def test_gradients_of_weight_and_bias_are_one_reduction(monkeypatch):
    example, reductions = case("add_layer_norm"), []
    real = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda self, *a: (reductions.append(self.shape), real(self, *a))[1])
    differentiate(example, "cpp")
    assert [len(shape) for shape in reductions] == [3]
