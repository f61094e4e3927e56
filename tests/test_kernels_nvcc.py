"""CUDA C++ without a GPU: it compiles, links and loads, and Python calls it with what it takes."""

import contextlib
import ctypes
import importlib.util
import re
import subprocess
import types
from pathlib import Path

import pytest
import torch
from kernels_cases import BF16, case, differentiate

from mimdet.kernels import OPS, build, registry

registry._load_all()
# attention_varlen's "cuda" is PyTorch's: nothing of it is in csrc.
CUDA_OPS = [op for op in OPS if registry._ops[op].get("cuda") is registry.can_run_cuda]
_DECLARATION = re.compile(r"MIMDET_CUDA_API\s+int\s+mimdet_(\w+)\((.*?)\)\s*\{", re.DOTALL)
# What C calls the elements that a tensor points to; void takes any.
_POINTEES = {"float": torch.float32, "int64_t": torch.int64, "bool": torch.bool}


def declared():
    """Function -> types of its parameters, from the sources."""
    text = "\n".join(path.read_text() for path in sorted(build.CSRC.glob("*.cu")))
    found = {}
    for name, parameters in _DECLARATION.findall(text):
        kinds = [re.sub(r"\s*\w+$", "", p.strip().removeprefix("const ")) for p in parameters.split(",")]
        found[name] = [kind.replace(" ", "") for kind in kinds]
    return found


@pytest.fixture(scope="module")
def library():
    if build.find_nvcc() is None:
        pytest.skip("no nvcc (install the CUDA toolkit, or set CUDA_HOME)")
    with pytest.MonkeyPatch.context() as patch:
        # One of the architectures that are shipped: the code is the same.
        patch.setenv("MIMDET_CUDA_ARCHS", "90")
        return build.compile_cuda(build._cache_folder())


def test_library_has_what_is_declared(library):
    loaded = ctypes.CDLL(str(library))
    assert declared()
    for name in declared():
        assert getattr(loaded, f"mimdet_{name}")


def test_library_exports_nothing_else(library):
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    names = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert sorted(n for n in names if n.startswith("mimdet_")) == sorted(f"mimdet_{n}" for n in declared())


def test_kernels_spill_nothing(library):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("cuobjdump comes with Triton, which is not installed")
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([tool, "-res-usage", str(library)], capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", listed)
    assert len(usage) >= len(declared())
    for name, registers, stack in usage:
        print(name, registers, stack)
        assert stack == "0", name
        assert int(registers) <= 128, name


@pytest.fixture
def calls(monkeypatch):
    """(function, arguments) of every call that would have gone to CUDA; CPU tensors stand for a GPU's."""
    made = []
    monkeypatch.setattr(build, "call_cuda", lambda name, *arguments: made.append((name, arguments)))
    for op in CUDA_OPS:
        monkeypatch.setitem(registry._ops[op], "cuda", lambda device, dtype: None)
    return made


def run(op, variant):
    made = case(op, dtype=BF16 if variant == "amp" else torch.float32)
    if variant == "fewest" and op == "add_layer_norm":
        # No branch, so nothing to scale.
        made = made._replace(others=made.others | {"scale": None, "branch": None})
        del made.inputs["branch"]
    if variant == "fewest" and op == "gather_add_pos":
        made = made._replace(others=made.others | {"pos": None})
        del made.inputs["pos"]
    differentiate(made, "cuda")


@pytest.mark.parametrize("variant", ["all", "amp", "fewest"])
@pytest.mark.parametrize("op", CUDA_OPS)
def test_calls_match_the_declarations(op, variant, calls):
    run(op, variant)
    assert len({name for name, _ in calls}) == (1 if op == "sample_tokens" else 2)
    for name, arguments in calls:
        *parameters, stream = declared()[name]
        assert stream == "cudaStream_t"
        assert len(arguments) == len(parameters), name
        for i, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True)):
            where = f"{name}, parameter {i + 1}, {parameter}"
            if parameter.endswith("*"):
                assert argument is None or isinstance(argument, torch.Tensor), where
                wanted = _POINTEES.get(parameter.removesuffix("*"))
                assert parameter == "void*" or argument is None or argument.dtype == wanted, where
            else:
                assert type(argument) in {"int64_t": (int, bool), "float": (float,)}[parameter], where


def test_nothing_is_declared_in_vain(calls):
    for op in CUDA_OPS:
        run(op, "all")
    assert {name for name, _ in calls} == set(declared())


PROBE = """
#include <cstdint>
extern "C" int mimdet_probe(const float* x, const void* none, int64_t big, float eps, int64_t flag, void* stream) {
  return !(x[1] == 2.0f && !none && big == (int64_t(1) << 40) && eps == 1e-6f && flag == 1 && stream == (void*)7);
}
extern "C" int mimdet_fail(const float*, void*) { return 700; }
"""


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """The library is one of C that looks at its arguments; the current stream is number 7."""
    compiler = build.shutil.which("c++") or build.shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "probe.cpp").write_text(PROBE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "probe.so", tmp_path / "probe.cpp"], check=True)
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(build, "_cuda_library", lambda: ctypes.CDLL(str(tmp_path / "probe.so")))
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    return entered


def test_arguments_arrive(probe):
    x = torch.tensor([1.0, 2.0])
    build.call_cuda("probe", x, None, 2**40, 1e-6, True)
    assert probe == [x.device]


def test_a_failed_launch_is_an_error(probe):
    with pytest.raises(RuntimeError, match="CUDA kernel fail failed with CUDA error 700"):
        build.call_cuda("fail", torch.zeros(1))
