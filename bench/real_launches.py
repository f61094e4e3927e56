"""Kernel launches of a config's training step, recorded on fake CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..kernels import OPS, ahead, build, library
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


class _Calls(TorchDispatchMode):
    """The kinds of calls of our operations inside ``with``: arguments of the first, and how many there are."""

    def __init__(self):
        super().__init__()
        self.calls: dict[tuple, tuple[tuple, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mimdet":
            call = function.overloadpacket.__name__, _kind(args)
            first, count = self.calls.get(call, (args, 0))
            self.calls[call] = first, count + 1
        return function(*args, **(kwargs or {}))


def record(options: Setting, implementations: Sequence[str], capability: int | str) -> list[Recorded]:
    """Kinds of launches of a training step on sm_<capability> or "gfx942", which may choose the sizes of tiles.

    Args:
        implementations: triton, cuda, or both.
    """
    recorded: dict[tuple, Recorded] = {}
    with fake_step(options) as (step, *_), target(capability):
        with _Calls() as counted:
            step()
        for ((name, _), (arguments, calls)), implementation in product(counted.calls.items(), implementations):
            described = *operation_of(name), implementation
            for launch in _launched(name, arguments, implementation):
                launch = Launch(launch.kernel, tuple(launch.grid), _pointers(launch.arguments), launch.constants)
                kind = *described, launch.kernel, launch.grid, _kind(launch.arguments), _kind(launch.constants)
                recorded.setdefault(kind, Recorded(*described, launch)).count += calls
    return list(recorded.values())


def _launched(name: str, arguments: tuple, implementation: str) -> list[Launch]:
    """What an operator would launch on a GPU, inside ``fake_gpu``; nothing where there is no such kernel."""
    operation, _ = operation_of(name)
    sources = (file.read_text() for file in build.CSRC.glob("*.cu"))
    if implementation == "cuda" and not any(f" mimdet_{operation}_" in source for source in sources):
        return []
    with {"triton": ahead.launches, "cuda": c_calls}[implementation]() as launches:
        library._runs[name](*(implementation if argument == "triton" else argument for argument in arguments))
    return launches


def operation_of(name: str) -> tuple[str, str]:
    """Operation and direction of an operator of ``torch.ops.mimdet``: "batch_norm_sums" -> batch_norm, backward."""
    operation = max((op for op in OPS if name.startswith(op)), key=len)
    return operation, "backward" if name.endswith(BACKWARD) else "forward"


@contextmanager
def c_calls() -> Iterator[list[Launch]]:
    """Inside, C functions are not called; yields the list that collects their calls.

    A call is a ``Launch`` with the function's name for its kernel, and an empty grid. Arguments are those of
    ``library.call_cuda``, with the sizes and the codes of dtypes at the end.
    """
    recorded: list[Launch] = []

    def call_cuda(name, *arguments, sizes=(), typed=()):
        codes = tuple(library._DTYPE_CODES[tensor.dtype] for tensor in typed)
        recorded.append(Launch(name, (), (*arguments, *sizes, *codes), {}))

    names = [path.parent.name for path in Path(library.__file__).parent.glob("*/cuda.py")]
    with ExitStack() as stack:
        for module in (library, *(import_module(f"mimdet.kernels.{name}.cuda") for name in names)):
            if hasattr(module, "call_cuda"):
                stack.enter_context(mock.patch.object(module, "call_cuda", call_cuda))
        yield recorded


def _pointers(arguments: tuple) -> tuple:
    """Arguments with a ``Pointer`` for each tensor, also inside of lists."""
    numbers = count(1)
    return tree_map_only(torch.Tensor, lambda tensor: Pointer(tensor, next(numbers)), arguments)


def _kind(value: Any) -> Any:
    """Hashable; equal for calls that launch the same."""
    if isinstance(value, torch.Tensor):
        return Pointer(value).kind()
    if isinstance(value, Pointer):
        return value.kind()
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return _kind(tuple(value.items())) if isinstance(value, Mapping) else value
