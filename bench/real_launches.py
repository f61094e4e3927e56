"""Kernel launches of a config's training step, recorded on fake CUDA tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels import ahead, library
from ..kernels.ahead import Launch
from .experiments.launches import fake_step
from .machine_code import Pointer, target
from .workload import Setting

BACKWARD = ("_backward", "_sums")


@dataclass
class Recorded:
    """One kind of launch of a step.

    Attributes:
        operation, direction, implementation: that launched it.
        launch: with ``Pointer`` for tensors. For CUDA C++ the kernel is the name of the C function, and the grid is
            empty: one function may launch several kernels.
        count: launches of a step.
    """

    operation: str
    direction: str
    implementation: str
    launch: Launch
    count: int = 0


class Recorder(TorchDispatchMode):
    """Records what each of our operations inside ``with`` would launch on a GPU; inside ``fake_gpu``.

    Args:
        implementations: triton, cuda, or both.

    Attributes:
        recorded: kinds of launches, in the order of the step.
    """

    def __init__(self, implementations: Sequence[str]):
        super().__init__()
        self.implementations = implementations
        self.recorded: dict[tuple, Recorded] = {}
        self._of_call: dict[tuple, list[Recorded]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "mimdet":
            self._record(function.overloadpacket.__name__, args)
        return result

    def _record(self, name: str, arguments: tuple) -> None:
        call = (name, _kind(arguments))
        if call not in self._of_call:
            self._of_call[call] = [
                one for impl in self.implementations for one in self._launched(name, arguments, impl)
            ]
        for one in self._of_call[call]:
            one.count += 1

    def _launched(self, name: str, arguments: tuple, implementation: str) -> list[Recorded]:
        operation, direction = operation_of(name)
        if implementation == "cuda" and not has_cuda(operation):
            return []
        arguments = tuple(implementation if argument == "triton" else argument for argument in arguments)
        recorders: dict[str, Callable] = {"triton": ahead.launches, "cuda": c_calls}
        with recorders[implementation]() as launches:
            library._runs[name](*arguments)
        kinds = []
        for launch in launches:
            launch = Launch(launch.kernel, tuple(launch.grid), _pointers(launch.arguments), launch.constants)
            described = operation, direction, implementation
            key = (
                *described,
                launch.kernel,
                launch.grid,
                _kind(launch.arguments),
                _kind(tuple(launch.constants.items())),
            )
            kinds.append(self.recorded.setdefault(key, Recorded(*described, launch)))
        return kinds


def record(options: Setting, implementations: Sequence[str], capability: int | str) -> list[Recorded]:
    """Kinds of launches of a training step on sm_<capability> or "gfx942", which may choose the sizes of tiles."""
    with fake_step(options) as (step, *_), target(capability), Recorder(implementations) as recorder:
        step()
    return list(recorder.recorded.values())


def operation_of(name: str) -> tuple[str, str]:
    """Operation and direction of an operator of ``torch.ops.mimdet``: "batch_norm_sums" -> batch_norm, backward."""
    from ..kernels import OPS

    operation = max((op for op in OPS if name.startswith(op)), key=len)
    return operation, "backward" if name.endswith(BACKWARD) else "forward"


def has_cuda(operation: str) -> bool:
    """Whether an operation has a kernel in csrc."""
    from ..kernels import build

    return any(f" mimdet_{operation}_" in file.read_text() for file in build.CSRC.glob("*.cu"))


class c_calls(ExitStack):  # noqa: N801
    """Inside, C functions are not called; ``with`` yields their recorded calls.

    A call is a ``Launch`` with the function's name for its kernel, and an empty grid. Arguments are those of
    ``library.call_cuda``, with the sizes and the codes of dtypes at the end.
    """

    def __enter__(self) -> list[Launch]:
        super().__enter__()
        recorded: list[Launch] = []

        def call_cuda(name, *arguments, sizes=(), typed=()):
            codes = tuple(library._DTYPE_CODES[tensor.dtype] for tensor in typed)
            recorded.append(Launch(name, (), (*arguments, *sizes, *codes), {}))

        folder = Path(library.__file__).parent
        for path in folder.glob("*/cuda.py"):
            import_module(f"mimdet.kernels.{path.parent.name}.cuda")
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("mimdet.kernels.") and hasattr(module, "call_cuda"):
                self.enter_context(mock.patch.object(module, "call_cuda", call_cuda))
        return recorded


def _pointers(arguments: Sequence[Any]) -> tuple:
    """Arguments with a ``Pointer`` for each tensor, also inside of lists."""
    count = 0

    def convert(argument):
        nonlocal count
        if isinstance(argument, torch.Tensor):
            count += 1
            return Pointer(argument, count)
        if isinstance(argument, (list, tuple)):
            return type(argument)(convert(one) for one in argument)
        return argument

    return tuple(convert(argument) for argument in arguments)


def _kind(value: Any) -> Any:
    """Hashable; equal for calls that launch the same."""
    if isinstance(value, torch.Tensor):
        return Pointer(value).kind()
    if isinstance(value, Pointer):
        return value.kind()
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return _kind(tuple(value.items())) if isinstance(value, Mapping) else value
