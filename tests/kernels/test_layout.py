"""Every operation has the same files, and its launchers the same names and arguments."""

import ast
import re
from pathlib import Path

import pytest

from mimdet.kernels import OPS, build, docs

ROOT = Path(__file__).parent.parent.parent
KERNELS = ROOT / "kernels"
# Attention has no kernel in csrc.
OURS = [op for op in OPS if op != "attention_varlen"]
CPP = "\n".join(path.read_text() for path in sorted(build.CSRC.glob("*.cpp")))
CUDA = "\n".join(path.read_text() for path in sorted(build.CSRC.glob("*.cu")))


def python_launches(path):
    """Launch function of a file -> names of its arguments."""
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {f.name: [a.arg for a in f.args.args] for f in functions if f.name.startswith("launch_")}


def cpp_arguments(name):
    schema = re.search(rf'"{name}\((.*?)\) -> \(\)"', CPP.replace('"\n      "', ""), re.DOTALL)[1]
    return [argument.split()[-1] for argument in schema.split(", ")]


def cuda_arguments(name):
    parameters = re.search(rf"mimdet_{name}\((.*?)\)\s*\{{", CUDA, re.DOTALL)[1]
    return [parameter.split()[-1] for parameter in parameters.split(",")]


@pytest.mark.parametrize("op", OPS)
def test_files(op):
    names = {path.name for path in (KERNELS / op).glob("*.py")}
    assert {"__init__.py", "api.py", "ops.py", "reference.py", "triton.py"} <= names


@pytest.mark.parametrize("op", OPS)
def test_triton_files_are_in_one_order(op):
    """Kernels of forward before those of backward, then the launches in that order."""
    names = [node.name for node in ast.parse((KERNELS / op / "triton.py").read_text()).body
             if isinstance(node, ast.FunctionDef) and re.search(r"_(fwd|bwd)\b|_(fwd|bwd)_", node.name)]  # fmt: skip
    launches = [name for name in names if name.startswith("launch_")]
    kernels = [name for name in names if name.endswith("_kernel")]
    assert launches == [f"launch_{op}_{way}" for way in ("fwd", "bwd")][: len(launches)]
    assert not kernels or names.index(launches[0]) > names.index(kernels[-1])


@pytest.mark.parametrize("op", OURS)
def test_launches_take_the_same_arguments(op):
    triton = python_launches(KERNELS / op / "triton.py")
    assert triton
    for function, arguments in triton.items():
        name = function.removeprefix("launch_")
        assert cpp_arguments(name) == arguments
        if (KERNELS / op / "cuda.py").is_file():
            assert python_launches(KERNELS / op / "cuda.py")[function] == arguments
        else:
            assert cuda_arguments(name)[: len(arguments)] == arguments


def test_attentions_launches_take_the_same_arguments():
    folder = KERNELS / "attention_varlen"
    assert python_launches(folder / "triton.py") == python_launches(folder / "aten_cpu.py")


def test_the_documented_table_is_the_dispatchers():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert docs.fill(text) == text, "python -m mimdet.kernels.docs docs/kernels.md"


def test_every_environment_variable_is_documented():
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    sources = [*KERNELS.rglob("*.py"), *build.CSRC.glob("*"), ROOT / "setup.py"]
    names = {name for path in sources for name in re.findall(r'"(MIMDET_[A-Z_]+)"', path.read_text())}
    assert names
    assert {name for name in names if f"`{name}`" not in text} == set()
