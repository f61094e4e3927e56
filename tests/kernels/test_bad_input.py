"""Non-tensors, wrong dtypes and wrong devices raise an error with the argument's name, for all operations."""

import pytest
import torch
from support.kernel_cases import OPS, case, public

ARGUMENTS = [
    (op, name)
    for op in OPS
    for name, value in {**case(op).inputs, **case(op).others}.items()
    if isinstance(value, torch.Tensor)
]
# What an operation calls them, where that is not the case's name.
NAMES = {"fine": r"features\[0\]", "coarse": r"features\[1\]"}
IDS = [f"{op}-{name}" for op, name in ARGUMENTS]


def call(op, **changes):
    example = case(op)
    return public(op)(**{**example.inputs, **example.others, **changes}, impl="eager")


@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=IDS)
def test_a_list_is_no_tensor(op, name):
    with pytest.raises(TypeError, match=rf"{op}: {NAMES.get(name, name)} must be a"):
        call(op, **{name: [1.0, 2.0]})


@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=IDS)
def test_dtypes(op, name):
    with pytest.raises(TypeError, match=rf"{op}: {NAMES.get(name, name)} must be"):
        call(op, **{name: {**case(op).inputs, **case(op).others}[name].to(torch.complex64)})


@pytest.mark.parametrize(("op", "name"), ARGUMENTS, ids=IDS)
def test_another_device(op, name):
    # All tensors must be on the first one's device.
    moved = {**case(op).inputs, **case(op).others}[name].to("meta")
    with pytest.raises(ValueError, match=rf"{op}: [\w\[\]]+ is on (meta|cpu), [\w\[\]]+ on (meta|cpu)"):
        call(op, **{name: moved})
