"""Helpers of kernel tests: poisoned memory, guard bands, layouts, and the implementations that run here."""

import contextlib
import importlib.util

import pytest
import torch

from mimdet.kernels import build, dispatch
from mimdet.kernels.dispatch import BF16, F16, F32  # noqa: F401
from mimdet.modeling import memory
from mimdet.testing.memory import poison, poisoned_allocations  # noqa: F401
from mimdet.testing.op_cases import layouts, quantized  # noqa: F401

INTERPRETED = dispatch.interpreting()
# Implementation -> device. Under Triton's interpreter only its kernels are tested, on the CPU.
PLACES = {"triton": "cpu"} if INTERPRETED else {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or INTERPRETED, reason="Triton's compiler is not here"
)
native = pytest.mark.skipif(INTERPRETED, reason="slow under the interpreter, or without Triton")


def here(native_cases, interpreted):
    """Cases of a ``runner`` on this machine; ``interpreted`` should be few: Triton's interpreter is slow."""
    return interpreted if INTERPRETED else native_cases


def usable(op, impl, device, dtype=F32):
    """Whether ``impl`` of ``op`` runs on this machine."""
    implementation = dispatch.operations()[op].implementations.get(impl)
    call = dispatch.Call(torch.device(device), (dtype,), equal_lengths=True)
    return implementation is not None and implementation.refusal(call) is None


# Plain PyTorch and C++, or Triton under its interpreter.
IMPLS = here(
    ["eager", pytest.param("cpp", marks=pytest.mark.skipif(not usable("bias_gelu", "cpp", "cpu"), reason="no C++"))],
    ["triton"],
)


def on_all(op):
    """Decorator: the test runs for eager, and for whatever else of ``op`` can run here."""
    places = [] if INTERPRETED else [("eager", "cpu")]
    places += [(impl, device) for impl, device in PLACES.items() if usable(op, impl, device)]
    return pytest.mark.parametrize(("impl", "device"), places, ids=[impl for impl, _ in places])


@contextlib.contextmanager
def mocked_gpu():
    """Inside, Triton and CUDA C++ refuse no call for want of a GPU."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "no_gpu", lambda *args, **kwargs: None)
            patch.setattr(dispatch, "too_old", lambda *args: None)
            patch.setattr(build, "cuda_unavailable", lambda: None)
            dispatch.forget()
            yield
    finally:
        dispatch.forget()


def activation_bytes(run, module):
    """``memory.activation_bytes`` of ``run()``, the module's parameters and buffers excluded."""
    return memory.activation_bytes(run, (*module.parameters(), *module.buffers()))


class Guarded:
    """A copy of a tensor with the same strides, in the middle of memory that is NaN (integers: their largest value).

    ``tensor`` is the copy; a kernel that reads past it reads NaN, and ``check`` fails if it wrote there.
    """

    BAND = 64

    def __init__(self, tensor):
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        filling = poison(tensor)
        self.memory = torch.full((span + 2 * self.BAND,), filling, dtype=tensor.dtype, device=tensor.device)
        self.tensor = self.memory.as_strided(tensor.shape, tensor.stride(), self.BAND)
        self.tensor.copy_(tensor)
        self.before = self.memory.clone()

    def check(self):
        """Nothing outside the tensor, and no input inside it, has changed."""
        assert torch.equal(self._bits(self.memory), self._bits(self.before)), "an input or memory around it was written"

    @staticmethod
    def _bits(memory):
        if not memory.is_floating_point():
            return memory
        return memory.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[memory.element_size()])
