"""Which implementation of an operation runs: the request, the implementations that support the call, the choice.

Each operation registers its implementations, best first. ``auto`` takes the first that supports the call and probes no
others: nothing slower is searched for, loaded or compiled. A named implementation runs or raises with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

import torch

from . import build

IMPLS = ("auto", "triton", "cuda", "cpp", "eager")
ENVIRONMENT = "MIMDET_KERNELS"

F32 = torch.float32
BF16 = torch.bfloat16
F16 = torch.float16

_use: ContextVar[str | None] = ContextVar("mimdet_kernels", default=None)


class KernelUnavailableError(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


class Call(NamedTuple):
    """Properties of a call that decide which implementations support it. It is hashed at every call, so it is small.

    Attributes:
        device: of the tensors, with its index.
        dtypes: of the tensors whose dtypes kernels depend on, the main input's first.
        too_large: why the tensors exceed the GPU kernels' limits; None if they do not.
        head_dim: of attention.
        equal_lengths: whether attention's sequences are known to have one length.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    too_large: str | None = None
    head_dim: int = 64
    equal_lengths: bool = False


class Implementation(NamedTuple):
    """One implementation of an operation.

    Attributes:
        supports: call -> None if it runs, else the reason with the remedy in brackets.
        device: where it runs, as text.
        dtypes: of ``Call`` that it takes; empty means all.
        limits: of shapes, as text; empty means none.
    """

    supports: Callable[[Call], str | None]
    device: str
    dtypes: tuple[torch.dtype, ...] = ()
    limits: str = ""

    def refusal(self, call: Call) -> str | None:
        """None if it runs the call, else the reason."""
        for dtype in call.dtypes:
            if self.dtypes and dtype not in self.dtypes:
                return f"no kernel for {dtype} (use eager, or {', '.join(map(dtype_name, self.dtypes))})"
        return self.supports(call)


class Row(NamedTuple):
    """One line of ``table``; ``reason`` says why it is not usable, ``limits`` what shapes it takes if it is."""

    op: str
    impl: str
    device: str
    usable: bool
    chosen: bool
    reason: str
    limits: str


class _Operation(NamedTuple):
    implementations: Mapping[str, Implementation]
    order: Callable[[Call], Sequence[str]]
    aliases: Mapping[str, str]


_operations: dict[str, _Operation] = {}
_resolved: dict[tuple, str] = {}


def supports_triton(call: Call) -> str | None:
    """Triton needs a GPU of compute capability 8.0 or AMD's, except under its interpreter."""
    if call.too_large:
        return call.too_large
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if interpreting():
        on_cpu = call.device.type == "cpu"
        return None if on_cpu else "Triton's interpreter works on CPU tensors (unset TRITON_INTERPRET)"
    reason = no_gpu("Triton kernels", call.device)
    if reason is None and torch.version.hip is None:
        reason = too_old("the Triton kernels need", call.device, "cuda or eager")
    return reason


def supports_cuda(call: Call) -> str | None:
    """CUDA C++ needs an NVIDIA GPU and either the shipped library or nvcc."""
    return call.too_large or no_gpu("CUDA kernels", call.device, rocm=False) or build.cuda_unavailable()


def supports_cpp(call: Call) -> str | None:
    """C++ needs CPU tensors and either the shipped library or a compiler."""
    return no_cpu(call.device) or build.cpp_unavailable()


def interpreting() -> bool:
    """Whether Triton's kernels run under its interpreter: thousands of times slower than eager, so auto skips it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_gpu(kernels: str, device: torch.device, *, rocm: bool = True) -> str | None:
    """The reason if the tensors of ``kernels``, a plural, are not on a GPU; an AMD GPU counts only with ``rocm``."""
    if device.type != "cuda":
        return f"{kernels} take tensors on a GPU, not on {device.type} (move them, or use cpp or eager)"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU (install a driver, and a build of PyTorch for it)"
    return f"{kernels} do not run on ROCm (use triton)" if torch.version.hip is not None and not rocm else None


def too_old(need: str, device: torch.device, instead: str) -> str | None:
    """The reason if an NVIDIA GPU is too old; ``need`` begins the sentence."""
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return None
    return f"{need} a GPU of compute capability 8.0 or newer (use {instead})"


def no_cpu(device: torch.device) -> str | None:
    """The reason if the tensors of C++ kernels are not on the CPU."""
    if device.type == "cpu":
        return None
    return f"C++ kernels take tensors on the CPU, not on {device.type} (move them, or use triton, cuda or eager)"


TRITON = Implementation(supports_triton, "GPU", (F32, BF16, F16))
CUDA = Implementation(supports_cuda, "NVIDIA GPU", (F32, BF16, F16))
CPP = Implementation(supports_cpp, "CPU", (F32, BF16))
EAGER = Implementation(lambda call: None, "any")


def register(
    op: str,
    implementations: Mapping[str, Implementation],
    order: Callable[[Call], Sequence[str]] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Announce an operation.

    Args:
        op: its name.
        implementations: by name, in auto's order of preference.
        order: call -> names in auto's order, where that depends on the call.
        aliases: general name -> name here.
    """
    _operations[op] = _Operation(implementations, order or (lambda call: tuple(implementations)), aliases or {})


def standard(limits: str = "", **changed: Callable[[Call], str | None]) -> dict[str, Implementation]:
    """Triton, CUDA C++, C++ and eager; ``limits`` are of the first two, ``changed`` replaces their ``supports``."""
    gpu = {"triton": TRITON, "cuda": CUDA}
    gpu = {name: impl._replace(limits=limits, supports=changed.get(name, impl.supports)) for name, impl in gpu.items()}
    return {**gpu, "cpp": CPP, "eager": EAGER}


@contextmanager
def use(impl: str) -> Iterator[None]:
    """Choose the implementation of every operation inside the block.

    The choice belongs to the current thread or task (a ``ContextVar``). Code compiled with ``torch.compile`` keeps
    the choice of its tracing: open the block around the first call.

    Raises:
        ValueError: not one of ``IMPLS``.
    """
    token = _use.set(_checked(impl, "mimdet.kernels.use", IMPLS))
    try:
        yield
    finally:
        _use.reset(token)


def requested(impl: str | None = None) -> str:
    """The argument, else that of the innermost ``use``, else the environment's, else "auto"."""
    return (_use.get() or _of_environment()) if impl is None else impl


@cache
def _of_environment() -> str:
    """Read once: a look at the environment takes longer than the rest of ``resolve``."""
    return os.environ.get(ENVIRONMENT) or "auto"


@torch.compiler.assume_constant_result
def resolve(
    op: str,
    impl: str | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    too_large: str | None = None,
    head_dim: int = 64,
    equal_lengths: bool = False,
) -> str:
    """The implementation that runs a call.

    Args:
        op: name in ``register``.
        impl: the caller's argument; None asks the context and the environment.
        device, dtypes, too_large, head_dim, equal_lengths: see ``Call``.

    Raises:
        ValueError: ``impl``, or that of the context or the environment, names no implementation.
        KernelUnavailableError: a named implementation cannot run; says why. Only "auto" falls back.
    """
    key = (op, requested(impl), device, dtypes, too_large, head_dim, equal_lengths)
    chosen = _resolved.get(key)
    if chosen is None:
        chosen = _resolved[key] = _resolve(op, impl, key[1], Call(*key[2:]))
    return chosen


def forget() -> None:
    """Clear what was read from the environment and the cache of choices; for tests that change what can run."""
    _of_environment.cache_clear()
    _resolved.clear()


def _resolve(op: str, argument: str | None, impl: str, call: Call) -> str:
    implementations, _, aliases = _operations[op]
    names = IMPLS if argument is None else tuple(dict.fromkeys((*IMPLS, *implementations)))
    _checked(impl, ENVIRONMENT if argument is None else "impl", names)
    impl = aliases.get(impl, impl)
    if impl == "auto":
        return _auto(op, call)
    if impl not in implementations:
        raise KernelUnavailableError(f"{op}: there is no {impl} implementation; it has {', '.join(implementations)}")
    reason = implementations[impl].refusal(call)
    if reason is not None:
        raise KernelUnavailableError(f"{op}: {impl} cannot run: {reason}. auto would choose {_auto(op, call)}.")
    return impl


def _auto(op: str, call: Call) -> str:
    implementations, order, _ = _operations[op]
    if call.device.type not in ("cpu", "cuda"):
        return "eager"
    tried = (name for name in order(call) if not (name == "triton" and interpreting()))
    return next(name for name in tried if implementations[name].refusal(call) is None)


def _checked(impl: str, source: str, names: Sequence[str]) -> str:
    if impl not in names:
        raise ValueError(f"{source}: {impl!r} is not an implementation; choose from {', '.join(names)}")
    return impl


def table(device: str | None = None, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Every operation and implementation: usable here or why not, and which one auto chooses.

    Attention is shown for head dim 64; auto's choice there is for sequences of different lengths.

    Args:
        device: "cpu" or "cuda"; by default both are shown where there is a GPU, else "cpu".
        dtype: dtype of the main input.
    """
    devices = [device] if device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows = []
    for op, operation in operations().items():
        for place in devices:
            call = Call(torch.device(place), (dtype,))
            chosen = _auto(op, call)
            for name, impl in operation.implementations.items():
                reason = impl.refusal(call._replace(equal_lengths=True))
                rows.append(Row(op, name, place, reason is None, name == chosen, reason or "usable", impl.limits))
    return rows


def operations() -> dict[str, _Operation]:
    """All operations, by name."""
    from . import OPS

    for op in OPS:
        importlib.import_module(f".{op}.ops", __package__)
    return {op: _operations[op] for op in OPS}


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")
