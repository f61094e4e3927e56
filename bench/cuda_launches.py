"""Launches of the CUDA C++ kernels without a GPU or a driver: a library in place of the CUDA runtime writes them down.

The library of ``csrc`` is linked with ``recording_runtime.cpp``. Host code of nvcc calls the runtime for two things: to
name its kernels when it is loaded, and to launch them. So launches, with their template instances, blocks and
arguments, are those of the real host code. Pointers are never followed on the host.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..kernels import build
from ..kernels.ahead import Launch
from .machine_code import Binary, Compiled, Pointer, disassemble, tool

_RUNTIME = Path(__file__).absolute().parent / "recording_runtime.cpp"


class _Dim3(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


_SIZES = attrgetter("x", "y", "z")
_Report = ctypes.CFUNCTYPE(None, ctypes.c_char_p, _Dim3, _Dim3, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))


class Library:
    """The kernels of csrc for one architecture, loaded without a GPU.

    Args:
        arch: as "sm_90".

    Raises:
        kernels.build.BuildError: no nvcc, or it failed.
        MissingToolError: no disassembler.
    """

    def __init__(self, arch: str):
        self._path = build.compile_cuda(build.cache_folder(), arch.removeprefix("sm_"), _RUNTIME)
        self._functions = ctypes.CDLL(str(self._path))
        self._reserved = 1024 if int(arch.removeprefix("sm_")) >= 90 else 0  # that cuobjdump counts

    def launches(self, call: Launch) -> list[Compiled]:
        """What a recorded C call launches; see ``real_launches.c_calls``."""
        launched = []

        def report(name: bytes, grid: _Dim3, block: _Dim3, shared: int, arguments) -> None:
            binary = _kernel(self._path, name.decode())
            values = [
                int.from_bytes(ctypes.string_at(arguments[i], size), "little")
                for i, (_, size) in enumerate(binary.parameters)
            ]
            warps = -(-block.x * block.y * block.z // 32)
            binary = binary._replace(shared=max(0, binary.shared - self._reserved) + shared, warps=warps)
            kernel, case = _readable(name.decode())
            launched.append(Compiled(kernel, case, binary, _SIZES(grid), _SIZES(block), values))

        function = _Report(report)
        self._functions.mimdet_report(function)
        try:
            code = getattr(self._functions, f"mimdet_{call.kernel}")(*_converted(call.arguments), ctypes.c_void_p(0))
        finally:
            self._functions.mimdet_report(_Report())
        if code:
            raise RuntimeError(f"mimdet: CUDA kernel {call.kernel} failed with CUDA error {code}")
        return launched


@cache
def _cubins(library: Path) -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool("cuobjdump"), "-xelf", "all", library], cwd=folder, capture_output=True, check=True)
        return [path.read_bytes() for path in sorted(Path(folder).glob("*.cubin"))]


def _kernel(library: Path, name: str) -> Binary:
    """By its mangled name; only the object that holds it is disassembled, which takes seconds."""
    cubin = next(cubin for cubin in _cubins(library) if f".text.{name}\0".encode() in cubin)
    return next(binary for binary in disassemble(cubin) if binary.name == name)


def _converted(arguments: Sequence[Any]) -> list:
    """As ``library.call_cuda`` does."""

    def value(argument: Any) -> Any:
        if argument is None or isinstance(argument, Pointer):
            return ctypes.c_void_p(argument.address if argument is not None else None)
        return (ctypes.c_float if isinstance(argument, float) else ctypes.c_int64)(argument)

    converted = []
    for argument in arguments:
        if isinstance(argument, list):
            elements = [value(element) for element in argument]
            converted.append((type(elements[0]) * len(elements))(*elements))
        else:
            converted.append(value(argument))
    return converted


def _readable(mangled: str) -> tuple[str, str]:
    """Name and template arguments of a kernel: "fwd", "bf16, 8"."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype = ctypes.c_char_p
    text = (demangle(mangled.encode(), None, None, None) or mangled.encode()).decode()
    match = re.search(r"(\w+)(?:<(.*)>)?\(", text.replace("(anonymous namespace)", "anonymous"))
    if not match:
        return mangled, ""
    case = re.sub(r"\((?:int|bool|long)\)", "", match[2] or "")
    return match[1], case.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace("float", "fp32")
