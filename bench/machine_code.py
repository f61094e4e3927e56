"""Machine code of kernels without a GPU: recorded launches are compiled ahead of time and disassembled."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import torch

from ..kernels.ahead import Launch
from .sass import REGION


class MissingToolError(RuntimeError):
    """Triton or one of the tools that come with it is not here; the message says what to install."""


class Pointer:
    """A tensor of a recorded launch for Triton's compiler: dtype and alignment, no memory.

    Attributes:
        dtype, shape, stride: of the tensor.
        address: that kernels get; as aligned as the tensor in its storage.
    """

    def __init__(self, tensor: torch.Tensor, number: int = 0):
        self.dtype, self.shape, self.stride = tensor.dtype, tuple(tensor.shape), tensor.stride()
        self.offset = tensor.storage_offset() * tensor.itemsize
        self.address = ((number + 1) << REGION) + self.offset

    def data_ptr(self) -> int:
        """As a tensor's; Triton asks whether 16 divides it."""
        return self.address

    @property
    def count(self) -> int:
        """Of its elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return self.count * self.dtype.itemsize

    def kind(self) -> tuple:
        """Equal for tensors with which a kernel does the same work."""
        return self.dtype, self.shape, self.stride, self.offset % 16


class Binary(NamedTuple):
    """One compiled kernel.

    Attributes:
        name: of its function.
        registers, stack: of a thread; bytes of stack are spilled registers.
        shared: bytes of a block.
        warps: of a block.
        code: what nvdisasm prints, with encodings; the amdgcn of an AMD GPU.
        ttir: Triton's IR; empty for CUDA C++.
        parameters: (offset in the constant bank, bytes) of each parameter.
        signature: Triton's parameters by name with their types; "constexpr" is not passed.
    """

    name: str
    registers: int
    stack: int
    shared: int
    warps: int
    code: str
    ttir: str = ""
    parameters: Sequence[tuple[int, int]] = ()
    signature: Mapping[str, Any] = MappingProxyType({})


class Compiled(NamedTuple):
    """One kernel of a recorded launch, compiled.

    Attributes:
        kernel: its name in the source.
        case: options or template arguments that choose this variant of it.
        binary: its machine code.
        grid, block: of the launch.
        arguments: by the parameters of ``binary``; of CUDA C++ their bits.
    """

    kernel: str
    case: str
    binary: Binary
    grid: Sequence[int]
    block: Sequence[int]
    arguments: Sequence[Any]


def triton_missing() -> str | None:
    """None if Triton is installed and compiles kernels, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton's interpreter compiles nothing (unset TRITON_INTERPRET)"
    return None


def tool(name: str) -> Path:
    """Path of cuobjdump or nvdisasm, which come with Triton.

    Raises:
        MissingToolError: they do not.
    """
    reason = None if importlib.util.find_spec("triton") else triton_missing()
    if reason is None:
        import triton

        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return path
        reason = f"{path} is missing (reinstall Triton: its wheels for Linux hold {name})"
    raise MissingToolError(reason)


class _Driver(SimpleNamespace):
    """What Triton's compiler asks the driver, of a GPU that is not here."""

    __hash__ = object.__hash__  # kernels cache by driver


def _driver(capability: int | str) -> _Driver:
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("hip", capability, 64) if isinstance(capability, str) else GPUTarget("cuda", capability, 32)
    return _Driver(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,  # one for a target, else Triton's cache returns the first one's kernel
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        map_python_to_cpp_type=lambda kind: "void*" if kind.startswith("*") else kind,
    )


@contextlib.contextmanager
def target(capability: int | str) -> Iterator[None]:
    """Inside, ``kernel.warmup(...)`` compiles for sm_<capability>, or for AMD's "gfx942"."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(_driver(capability))
    try:
        yield
    finally:
        driver._active = before


def compile_triton(capability: int | str, launch: Launch) -> Binary:
    """Compile one launch for sm_<capability> or "gfx942"; its tensors may be ``Pointer``.

    Raises:
        MissingToolError: no disassembler.
    """
    with target(capability):
        built = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.constants)
    metadata = built.metadata
    if isinstance(capability, str):
        code = built.asm["amdgcn"]
        registers, stack = (int(re.search(rf"\.{key}:\s+(\d+)", code)[1]) for key in _AMD_KEYS)
        return Binary(metadata.name, registers, stack, metadata.shared, metadata.num_warps, code, built.asm["ttir"])
    (one,) = disassemble(built.asm["cubin"])
    return one._replace(
        shared=metadata.shared, warps=metadata.num_warps, ttir=built.asm["ttir"], signature=built.src.signature
    )


@lru_cache(maxsize=256)
def disassemble(cubin: bytes) -> list[Binary]:
    """Every kernel of a cubin; shared bytes are those that the code declares.

    Raises:
        MissingToolError: no disassembler.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = _output("cuobjdump", "-res-usage", "-elf", file.name)
        text = _output("nvdisasm", "-hex", file.name)
    usage = {m[1]: m for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", listed)}
    sections = dict(_SECTION.findall(text))
    information = dict(_INFORMATION.findall(listed))
    return [
        Binary(
            name, int(usage[name][2]), int(usage[name][3]), int(usage[name][4]), 0, code,
            parameters=_parameters(information.get(name, "")),
        )
        for name, code in sections.items()
        if name in usage
    ]  # fmt: skip


_SECTION = re.compile(r"^\.text\.(\S+):\n(.*?)(?=^//-----|\Z)", re.MULTILINE | re.DOTALL)
_INFORMATION = re.compile(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\S|\Z)", re.MULTILINE | re.DOTALL)


def _parameters(information: str) -> tuple[tuple[int, int], ...]:
    """(offset in constant bank 0, bytes) of a kernel's parameters, in their order."""
    start = re.search(r"EIATTR_PARAM_CBANK\s+Format:\s*\S+\s+Value:\s+0x\w+ 0x(\w+)", information)
    start = int(start[1], 16) & 0xFFFF if start else 0
    entries = re.findall(r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)", information)
    ordered = sorted(tuple(int(word, 16) for word in words) for words in entries)
    return tuple((start + offset, size) for _, offset, size in ordered)


def _output(name: str, *arguments: str) -> str:
    return subprocess.run([tool(name), *arguments], capture_output=True, text=True, check=True).stdout


_AMD_KEYS = ("vgpr_count", "private_segment_fixed_size")

_INT32 = 2**31
# Largest program ids: limits of CUDA's grid along x, and along y or z.
_PROGRAMS = {"x": _INT32 - 1, "y": 2**16 - 1, "z": 2**16 - 1}
_DEFINITION = re.compile(r"%([\w.$-]+)(?::\d+)? = (?:\"?)([\w.]+)(.*)")
_OPERAND = re.compile(r"%[\w.$#-]+")


def narrow_products(ttir: str) -> list[str]:
    """Names of the addresses in Triton's IR that depend on an int32 product whose factors allow 2**31 or more.

    Every integer has a bound: constants, ranges and program ids their value, arguments and loaded values that of their
    type. Sums are assumed to fit: int32 counts (channels, tokens) are far below 2**31.
    """
    bounds: dict[str, int] = {}
    wrapped: set[str] = set()
    narrow: list[str] = []
    for line in ttir.splitlines():
        definition = _DEFINITION.search(line.split(" loc(")[0])
        if not definition:
            continue
        name, operation, rest = definition.groups()
        name = f"%{name}"
        operands = [o.split("#")[0] for o in _OPERAND.findall(rest)]
        widest = 2**63 if re.search(r"\bi64\b|xi64>", rest.rsplit(":", 1)[-1]) else _INT32 - 1
        known = [bounds.get(o, widest) for o in operands]
        bound = widest
        if operation == "arith.constant":
            number = re.search(r"(-?\d+)>? :", rest)
            bound = abs(int(number[1])) if number else widest
        elif operation == "tt.make_range":
            bound = int(re.search(r"end = (\d+)", rest)[1])
        elif operation == "tt.get_program_id":
            bound = _PROGRAMS[rest.split()[0]]
        elif operation == "arith.muli":
            bound = known[0] * known[1]
        elif operation in ("arith.addi", "arith.subi"):
            bound = min(sum(known), widest)
        elif operation in ("arith.divsi", "arith.divui"):
            bound = known[0]
        elif operation in ("arith.remsi", "arith.remui", "arith.minsi"):
            bound = min(known)
        elif operation.startswith(("arith.ext", "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape")):
            bound = known[0]
        wraps = operation == "arith.muli" and widest < _INT32 and bound >= _INT32
        passes_on = operation.startswith(("arith.", "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape"))
        wrapped.discard(name)
        if wraps or (passes_on and "cmp" not in operation and wrapped.intersection(operands)):
            wrapped.add(name)
        bounds[name] = min(bound, widest)
        if operation == "tt.addptr" and operands[1] in wrapped:
            narrow.append(name)
    return narrow
