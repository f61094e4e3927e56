"""Non-tensors, wrong dtypes and wrong devices raise an error with the argument's name, for all operations."""

import pytest
import torch
from support.kernel_cases import changed, tensors_of

from mimdet.kernels import OPS
from mimdet.testing.op_cases import case

# What an operation calls them, where that is not the case's name.
NAMES = {"fine": r"features\[0\]", "coarse": r"features\[1\]"}
on_arguments = pytest.mark.parametrize(
    ("op", "name"), [pytest.param(op, name, id=f"{op}-{name}") for op in OPS for name in tensors_of(case(op))]
)


def call(op, name, change):
    example = case(op)
    return changed(example, **{name: change(tensors_of(example)[name])})("eager")


@on_arguments
def test_a_list_is_no_tensor(op, name):
    with pytest.raises(TypeError, match=rf"{op}: {NAMES.get(name, name)} must be a"):
        call(op, name, lambda tensor: [1.0, 2.0])


@on_arguments
def test_dtypes(op, name):
    with pytest.raises(TypeError, match=rf"{op}: {NAMES.get(name, name)} must be"):
        call(op, name, lambda tensor: tensor.to(torch.complex64))


@on_arguments
def test_another_device(op, name):
    # All tensors must be on the first one's device.
    with pytest.raises(ValueError, match=rf"{op}: [\w\[\]]+ is on (meta|cpu), [\w\[\]]+ on (meta|cpu)"):
        call(op, name, lambda tensor: tensor.to("meta"))
