"""Fixtures of the operations' tests.

With TRITON_INTERPRET=1 set before Triton is imported, so in a process of its own, ``runner`` is Triton's interpreter
and only the tests that take it are collected. Else it is every implementation that runs on this machine.
"""

import pytest
import torch
from support.kernels import INTERPRETED, PLACES, poisoned_allocations, usable

from mimdet.testing import interpreter


def pytest_collection_modifyitems(items):
    if INTERPRETED:
        items[:] = [item for item in items if {"runner", "impl", "interpreter"} & set(item.fixturenames)]


@pytest.fixture(params=PLACES)
def runner(request):
    """(implementation, device) of the module's OP; skips what cannot run."""
    device = PLACES[request.param]
    if not usable(request.module.OP, request.param, device):
        pytest.skip(f"{request.param} cannot run here")
    return request.param, device


@pytest.fixture
def cpp(request):
    """For tests of C++ alone."""
    if not usable(request.module.OP, "cpp", "cpu"):
        pytest.skip("no C++ kernels here")


@pytest.fixture
def far_rows(tmp_path, runner):
    """(1, 65, 64) bfloat16 zeros whose rows are 2**25 elements apart: 32-bit products of row and stride wrap."""
    if runner[1] != "cpu":
        pytest.skip("a sparse file is in the CPU's memory")
    # A sparse file: four gigabytes of addresses, a few kilobytes of disk.
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**31 + 64, dtype=torch.bfloat16)
    return memory.as_strided((1, 65, 64), (0, 2**25, 1))


@pytest.fixture(name="interpreter")
def _interpreter():
    """For tests of the interpreter itself."""


@pytest.fixture
def poisoned():
    """New memory is NaN."""
    with poisoned_allocations():
        yield


if INTERPRETED:
    interpreter.patch()
