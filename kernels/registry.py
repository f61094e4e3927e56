"""What can run here, and the choice among it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from . import build
from .selector import WORDS, KernelUnavailableError, requested

# (device type, dtype) -> None when it can run, else the reason with the remedy.
CanRun = Callable[[str, torch.dtype], "str | None"]

# What auto tries, in this order, for a device type. Other devices run eager.
_PREFERENCE = {"cpu": ("cpp", "eager"), "cuda": ("triton", "cuda", "eager")}
_DTYPES = {
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float32, torch.bfloat16),
}
_ops: dict[str, dict[str, CanRun]] = {}
_orders: dict[str, dict[str, tuple[str, ...]]] = {}
_lock = threading.Lock()


class Row(NamedTuple):
    """One line of ``table``."""

    op: str
    impl: str
    device: str
    usable: bool
    chosen: bool
    reason: str


def register(op: str, *, order: dict[str, tuple[str, ...]] | None = None, **can_run: CanRun) -> None:
    """Announce an operation.

    Args:
        op: its name.
        order: what auto tries for a device type, where that is not triton, cuda, cpp, eager.
        can_run: name of an implementation -> what decides, mostly ``can_run_triton``, ``can_run_cuda`` and
            ``can_run_cpp``. Leave out what is not written; "eager" always exists. A name that is not one of the
            selector's words can only be given as the operation's ``impl``.
    """
    with _lock:
        _ops[op] = {**can_run, "eager": lambda device, dtype: None}
        _orders[op] = order or {}


def can_run_triton(device: str, dtype: torch.dtype) -> str | None:
    """Triton needs a GPU, except under its interpreter."""
    reason = wrong_dtype("Triton kernel", dtype, _DTYPES["triton"])
    if reason:
        return reason
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None if device == "cpu" else "Triton's interpreter works on CPU tensors (unset TRITON_INTERPRET)"
    reason = no_gpu("Triton kernels", device)
    if reason:
        return reason
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the Triton kernels need a GPU of compute capability 8.0 or newer (use cuda or eager)"
    return None


def can_run_cuda(device: str, dtype: torch.dtype) -> str | None:
    """CUDA C++ needs an NVIDIA GPU and either the shipped library or nvcc."""
    reason = wrong_dtype("CUDA kernel", dtype, _DTYPES["cuda"]) or no_gpu("CUDA kernels", device, rocm=False)
    return reason or build.cuda_unavailable()


def can_run_cpp(device: str, dtype: torch.dtype) -> str | None:
    """C++ needs CPU tensors and either the shipped library or a compiler."""
    return wrong_dtype("C++ kernel", dtype, _DTYPES["cpp"]) or no_cpu(device) or build.cpp_unavailable()


def wrong_dtype(what: str, dtype: torch.dtype, dtypes: Sequence[torch.dtype]) -> str | None:
    """The reason if ``dtype`` is none of ``dtypes``, for which alone there is ``what``."""
    names = " or ".join(", ".join(str(d).removeprefix("torch.") for d in dtypes).rsplit(", ", 1))
    return None if dtype in dtypes else f"no {what} for {dtype} (use eager, or {names})"


def no_gpu(what: str, device: str, *, rocm: bool = True) -> str | None:
    """The reason if the tensors of ``what``, a plural, are not on a GPU that there is; on AMD's only with ``rocm``."""
    if device != "cuda":
        return f"{what} take tensors on a GPU, not on {device} (move them, or use cpp or eager)"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU (install a driver, and a build of PyTorch for it)"
    return f"{what} do not run on ROCm (use triton)" if torch.version.hip is not None and not rocm else None


def no_cpu(device: str) -> str | None:
    """The reason if the tensors of C++ kernels are not on the CPU."""
    if device == "cpu":
        return None
    return f"C++ kernels take tensors on the CPU, not on {device} (move them, or use triton, cuda or eager)"


@torch.compiler.assume_constant_result
def choose(op: str, impl: str | None, device: str, dtype: torch.dtype) -> str:
    """The implementation that runs: the first of ``candidates``, with its arguments and errors."""
    return candidates(op, impl, device, dtype)[0]


@torch.compiler.assume_constant_result
def candidates(op: str, impl: str | None, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The implementation that is named, alone; for "auto" all that can run, best first.

    Args:
        op: name given to ``register``.
        impl: the caller's argument; None asks the context and the environment.
        device: device type of the tensors.
        dtype: dtype of the main input.

    Raises:
        KernelUnavailableError: a named implementation cannot run; says why. Only "auto" falls back.
    """
    available = _ops[op]
    word = requested(impl, tuple(name for name in available if name not in WORDS))
    if word == "auto":
        order = (name for name in _preference(op, device) if name in available)
        return tuple(name for name in order if available[name](device, dtype) is None)
    if word not in available:
        raise KernelUnavailableError(f"{op}: there is no {word} implementation; it has {', '.join(available)}")
    reason = available[word](device, dtype)
    if reason is not None:
        raise KernelUnavailableError(f"{op}: {word} cannot run: {reason}. auto would choose what can.")
    return (word,)


def table(device: str | None = None, dtype: torch.dtype = torch.float32) -> list[Row]:
    """Every operation and implementation: usable here or why not, and which one auto chooses.

    Args:
        device: "cpu" or "cuda"; by default both are shown where there is a GPU, else "cpu".
        dtype: dtype of the main input.
    """
    devices = [device] if device else ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    _load_all()
    rows = []
    for op, implementations in _ops.items():
        for where in devices:
            auto = choose(op, "auto", where, dtype)
            for name, can_run in implementations.items():
                reason = can_run(where, dtype)
                rows.append(Row(op, name, where, reason is None, name == auto, reason or "usable"))
    return rows


def _preference(op: str, device: str) -> tuple[str, ...]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        # Thousands of times slower than eager: only by name.
        return ("cpp", "eager") if device == "cpu" else ("eager",)
    return _orders[op].get(device) or _PREFERENCE.get(device, ("eager",))


def _load_all() -> None:
    from . import OPS

    for op in OPS:
        importlib.import_module(f".{op}.ops", __package__)
