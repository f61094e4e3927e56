"""Triton's interpreter, which runs kernels on CPU tensors."""

from __future__ import annotations

import numpy as np


def patch() -> None:
    """Mend what differs from a GPU; call it once, where TRITON_INTERPRET is 1 before Triton is imported."""
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
