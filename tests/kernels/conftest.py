"""Fixtures of the operations' tests, and patches of Triton's interpreter.

With TRITON_INTERPRET=1 set before Triton is imported, so in a process of its own, ``runner`` is Triton's interpreter
and only the tests that take it are collected. Else it is every implementation that runs on this machine.
"""

import pytest
import torch
from support.kernels import INTERPRETED, PLACES, poisoned_allocations, threads, usable


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


@pytest.fixture
def interpreter():
    """For tests of the interpreter itself."""


@pytest.fixture
def poisoned():
    """New memory is NaN."""
    with poisoned_allocations():
        yield


@pytest.fixture
def two_threads():
    """PyTorch has two threads."""
    with threads(2):
        yield


def _patch_interpreter():
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # range() over a runtime bound asks the bound for an index; numpy >= 2.4 no longer gives one for 1-element arrays.
    # Triton sets its own again at every launch.
    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])

    interpreter._patch_lang_tensor = patch_lang_tensor

    # The interpreter truncates float32 -> bfloat16; GPUs round to nearest even.
    original = interpreter.InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
            rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            nan = np.isnan(src.data)
            return interpreter.TensorHandle(np.where(nan, np.uint16(0x7FC0), rounded), dst_type.scalar)
        return original(self, src, dst_type)

    interpreter.InterpreterBuilder.create_fp_trunc = create_fp_trunc


if INTERPRETED:
    _patch_interpreter()
