"""Triton's interpreter, made to behave: its own process only, with the variable set before Triton is imported."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# These tests need a process of their own: test_kernels_interpreter.py starts it.
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]


def _mend():
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

    # float32 -> bfloat16 is cut off by the interpreter; GPUs round to nearest even.
    original = interpreter.InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            bits = np.ascontiguousarray(src.data, dtype=np.float32).view(np.uint32)
            rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            nan = np.isnan(src.data)
            return interpreter.TensorHandle(np.where(nan, np.uint16(0x7FC0), rounded), dst_type.scalar)
        return original(self, src, dst_type)

    interpreter.InterpreterBuilder.create_fp_trunc = create_fp_trunc


if INTERPRETING:
    _mend()


@pytest.fixture(autouse=True)
def _poisoned():
    from kernels_testing import poisoned_allocations

    with poisoned_allocations():
        yield
