"""Compiles Triton kernels before they are launched, in parallel.

A kernel is compiled again where the dtype of a tensor, its alignment or a constant is another. Which ones a model needs
is told by a step of it on fake tensors (``torch._subclasses.FakeTensorMode``), which have shapes and take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import build, library


class KernelCompilationError(RuntimeError):
    """A Triton kernel does not compile."""


class Launch(NamedTuple):
    """A recorded launch: arguments by position, constants and compiler options by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """All arguments and options by name."""
        return {**dict(zip(self.kernel.arg_names, self.arguments, strict=False)), **self.constants}


class _Address:
    """What Triton asks of a tensor: dtype, alignment and, for AMD's GPUs, bytes.

    PyTorch's allocator aligns the beginning of memory, so the offset tells the alignment.
    """

    def __init__(self, tensor: torch.Tensor):
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()
        self._bytes = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return self._offset

    def ptr_range(self) -> int:
        return self._bytes


class _Launchers(TorchDispatchMode):
    """Calls the launchers of operations with fake tensors; other operations, and other implementations, compute
    shapes alone."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mimdet" and any(isinstance(a, str) and a == "triton" for a in args):
            return library.run_of(function)(*args)
        return function(*args, **(kwargs or {}))


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Inside, Triton's kernels are not launched; yields the list that collects their launches."""
    from triton.runtime.jit import JITFunction

    recorded, run = [], JITFunction.run

    def record(kernel, *arguments, grid, warmup, **constants):
        if warmup:
            return run(kernel, *arguments, grid=grid, warmup=warmup, **constants)
        recorded.append(Launch(kernel, grid, arguments, constants))
        return None

    JITFunction.run = record
    try:
        yield recorded
    finally:
        JITFunction.run = run


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """``launches``, also of operations of ``mimdet`` that compute with fake tensors. Their results have no numbers."""
    with launches() as recorded, _Launchers():
        yield recorded


def compile_all(recorded: Sequence[Launch], progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Compile the kernels of launches for the current GPU, as many at a time as this process has CPU cores.

    Triton caches them in this process and on disk, from where other processes load them.

    Args:
        progress: called with the number of kernels that are ready, and of all.

    Returns:
        the number of kernels that this process did not have.

    Raises:
        KernelCompilationError: names the kernel and the reason.
    """
    from triton import AsyncCompileMode, FutureKernel

    with ThreadPoolExecutor(build.cores()) as pool, AsyncCompileMode(pool, ignore_errors=True):
        waiting = {}
        for kernel, grid, arguments, constants in recorded:
            with _naming(kernel, pool):
                compiled = kernel.run(*map(_without_memory, arguments), grid=grid, warmup=True, **constants)
            if isinstance(compiled, FutureKernel):
                waiting[id(compiled)] = kernel, compiled
        for done, (kernel, compiled) in enumerate(waiting.values()):
            progress(done, len(waiting))
            with _naming(kernel, pool):
                compiled.result()
        return len(waiting)


def warm_up(step: Callable[[], object], progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Compile the Triton kernels that ``step`` would launch; see ``recording`` and ``compile_all``.

    Args:
        step: computes with fake tensors of the current GPU.
        progress: called with the number of kernels that are ready, and of all.

    Returns:
        the number of compiled kernels.

    Raises:
        KernelCompilationError: names the kernel and the reason.
    """
    with recording() as recorded:
        step()
    return compile_all(recorded, progress)


@contextmanager
def _naming(kernel: Any, pool: ThreadPoolExecutor) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        pool.shutdown(wait=False, cancel_futures=True)
        raise KernelCompilationError(f"Triton cannot compile {kernel.__name__}: {error}") from error


def _without_memory(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return _Address(argument)
    return tuple(map(_without_memory, argument)) if isinstance(argument, tuple) else argument
