"""CUDA C++ without a GPU: it compiles, links and loads, and Python's calls match the declarations."""

import ctypes
import importlib
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torch
from support.kernel_cases import pretend

from mimdet.kernels import build, dispatch, library
from mimdet.testing.op_cases import BF16, DIFFERENTIABLE, F32, IMAGES, OPTIONAL, case, differentiate

# Attention's "cuda" is PyTorch's.
CUDA_OPS = [op for op, operation in dispatch.operations().items() if "cuda" in operation.implementations]
_DECLARATION = re.compile(r"MIMDET_CUDA_API\s+int\s+mimdet_(\w+)\((.*?)\)\s*\{", re.DOTALL)
# C types of a tensor's elements; void takes any.
_POINTEES = {
    "float": torch.float32,
    "double": torch.float64,
    "int8_t": torch.int8,
    "int32_t": torch.int32,
    "int64_t": torch.int64,
    "bool": torch.bool,
}
# C types of a list: an array in host memory.
_ARRAYS = {"void*const*": torch.Tensor, "float*": float, "int64_t*": int}
# Operations whose cuda.py allocates scratch memory.
_SCRATCH = (*IMAGES, "nms_slots", "roi_align_levels")


def declared():
    """Function -> types of its parameters, from the sources."""
    text = "\n".join(path.read_text() for path in sorted(build.CSRC.glob("*.cu")))
    functions = {}
    for name, parameters in _DECLARATION.findall(text):
        kinds = [re.sub(r"\s*\w+$", "", p.strip().removeprefix("const ")) for p in parameters.split(",")]
        functions[name] = [kind.replace(" ", "") for kind in kinds]
    return functions


@pytest.fixture(scope="module")
def compiled():
    if build.find_nvcc() is None:
        pytest.skip("no nvcc (install the CUDA toolkit, or set CUDA_HOME)")
    with pytest.MonkeyPatch.context() as patch:
        # One architecture is enough: the source is the same.
        patch.setenv("MIMDET_CUDA_ARCHS", "90")
        return build.compile_cuda(build.cache_folder())


def test_library_has_what_is_declared(compiled):
    loaded = ctypes.CDLL(str(compiled))
    assert declared()
    for name in declared():
        assert getattr(loaded, f"mimdet_{name}")


def test_library_exports_nothing_else(compiled):
    listed = subprocess.run(["nm", "-D", "--defined-only", str(compiled)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert sorted(n for n in names if n.startswith("mimdet_")) == sorted(f"mimdet_{n}" for n in declared())


def cuobjdump(option, library):
    """Output of the tool of Triton's package."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("cuobjdump comes with Triton, which is not installed")
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, str(library)], capture_output=True, text=True, check=True).stdout


def test_kernels_spill_nothing(compiled):
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", compiled))
    assert len(usage) >= len(declared())
    for name, registers, stack in usage:
        print(name, registers, stack)
        assert stack == "0", name
        assert int(registers) <= 128, name


# Bytes of the types in a kernel's template arguments, as the Itanium ABI mangles them.
_BYTES = {"f": 4, "13__nv_bfloat16": 2, "6__half": 2}
_ARGUMENTS = re.compile(rf"I((?:{'|'.join(_BYTES)}|S\d?_|Li\d+E)+)E")
_ACCESS = re.compile(r"(LDG|STG)\.E(\S*) .*?\[R(\d+)(?:\.64)?(?:\+(-?0x[0-9a-f]+))?\]")


def vector_kernels(library):
    """(name, widths in bits of its vectors, accesses of its machine code) of each kernel that takes vectors.

    An access is (LDG or STG, width in bits, register of the address, offset).
    """
    for function in cuobjdump("-sass", library).split("Function : ")[1:]:
        name = function.split()[0]
        arguments = _ARGUMENTS.search(name)
        lanes = re.search(r"Li(\d+)E", arguments[1]) if arguments else None
        if lanes is None or lanes[1] == "1":
            continue
        types = set(re.findall("|".join(_BYTES), arguments[1]))
        accesses = [
            (kind, _width(options), register, int(offset or "0", 16))
            for kind, options, register, offset in _ACCESS.findall(function)
        ]
        yield name, {min(8 * _BYTES[t] * int(lanes[1]), 128) for t in types}, accesses


def _width(options):
    match = re.search(r"\.(?:[US](8|16)|(64|128))\b", options)
    return int(match[1] or match[2]) if match else 32


def test_vectors_are_single_accesses(compiled):
    """nvcc may split the load or store of a vector into those of its elements."""
    kernels = list(vector_kernels(compiled))
    assert len(kernels) > 60
    for name, widths, accesses in kernels:
        used = {kind: {width for other, width, *_ in accesses if other == kind} for kind in ("LDG", "STG")}
        assert widths & used["LDG"], (name, used)
        assert widths <= used["LDG"] | used["STG"], (name, used)
        assert min(used["LDG"] | used["STG"]) >= 32, (name, used)
        # Kernels load a few numbers of 32 bits side by side on purpose: sizes, and weights one by one.
        narrow = {access for access in accesses if access[1] < 128 and access[:2] != ("LDG", 32)}
        for kind, width, register, offset in narrow:
            assert (kind, width, register, offset + width // 8) not in narrow, (name, kind, width, register, offset)


@pytest.fixture
def calls(monkeypatch):
    """Records (function, arguments) of CUDA calls instead of making them; tensors are on the CPU."""
    recorded = []

    def call_cuda(name, *arguments, sizes=(), typed=()):
        recorded.append((name, (*arguments, *sizes, *(library._DTYPE_CODES[tensor.dtype] for tensor in typed))))

    for module in (library, *(importlib.import_module(f"mimdet.kernels.{op}.cuda") for op in _SCRATCH)):
        monkeypatch.setattr(module, "call_cuda", call_cuda)
    with pretend("cuda", *CUDA_OPS):
        yield recorded


def run(op, variant):
    bare = variant == "fewest" and op in OPTIONAL
    differentiate(case(op, dtype=BF16 if variant == "amp" else F32, bare=bare), "cuda")


@pytest.mark.parametrize("variant", ["all", "amp", "fewest"])
@pytest.mark.parametrize("op", CUDA_OPS)
def test_calls_match_the_declarations(op, variant, calls):
    run(op, variant)
    assert len({name for name, _ in calls}) == (5 if op == "batch_norm" else 2 if op in DIFFERENTIABLE else 1)
    for name, arguments in calls:
        *parameters, stream = declared()[name]
        assert stream == "cudaStream_t"
        assert len(arguments) == len(parameters), name
        for i, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            where = f"{name}, parameter {i + 1}, {parameter}"
            if isinstance(argument, list):
                assert {type(element) for element in argument} == {_ARRAYS[parameter]}, where
            elif parameter.endswith("*"):
                assert argument is None or isinstance(argument, torch.Tensor), where
                dtype = _POINTEES.get(parameter.removesuffix("*"))
                assert parameter == "void*" or argument is None or argument.dtype == dtype, where
            else:
                assert type(argument) in {"int64_t": (int, bool), "float": (float,)}[parameter], where


def test_nothing_is_declared_in_vain(calls):
    for op in CUDA_OPS:
        run(op, "all")
    assert {name for name, _ in calls} == set(declared())


PROBE = """
#include <cstdint>
extern "C" int mimdet_probe(const float* x, const void* none, int64_t big, float eps, int64_t flag,
                            const float* const* maps, const float* scales, const int64_t* heights, int64_t size,
                            int64_t dtype, void* stream) {
  return !(x[1] == 2.0f && *maps[1] == 2.0f && scales[1] == 0.25f && heights[1] == 3 && !none &&
           big == (int64_t(1) << 40) && eps == 1e-6f && flag == 1 && size == 3 && dtype == 1 && stream == (void*)7);
}
extern "C" int mimdet_fail(const float*, void*) { return 700; }
"""


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """A C library that checks its arguments; the current stream is number 7."""
    compiler = build.shutil.which("c++") or build.shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "probe.cpp").write_text(PROBE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "probe.so", tmp_path / "probe.cpp"], check=True)
    monkeypatch.setattr(build, "cuda_library", lambda: ctypes.CDLL(str(tmp_path / "probe.so")))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)


def test_arguments_arrive(probe):
    x = torch.tensor([1.0, 2.0])
    lists = [x, x[1:]], [0.5, 0.25], [2, 3]
    library.call_cuda("probe", x, None, 2**40, 1e-6, True, *lists, sizes=(3,), typed=(x.bfloat16(),))


def test_a_failed_launch_is_an_error(probe):
    with pytest.raises(RuntimeError, match="CUDA kernel fail failed with CUDA error 700"):
        library.call_cuda("fail", torch.zeros(1))
