"""Runs the kernels of a .cu file on a CPU: slow, and only for files that take little from CUDA; see cuda_on_cpu.h."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mimdet.kernels import build, library

_LAUNCH = re.compile(r"([\w:]+)<<<(.+?), ([\w:]+), 0, stream>>>\((.*?)\);", re.DOTALL)


def run_cuda_on_cpu(monkeypatch, folder, name):
    """Compile ``csrc/<name>`` for the CPU; from here on ``library.call_cuda`` calls its functions with CPU tensors.

    Args:
        monkeypatch: pytest's.
        folder: for the library.
        name: of a file in csrc.
    """
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ and the barriers of Linux")
    text, count = _LAUNCH.subn(r"launch(\2, \3, [&] { \1(\4); });", (build.CSRC / name).read_text())
    assert count == text.count("launch(") > 0
    assert "<<<" not in text
    (folder / "kernels.cpp").write_text(text)
    shutil.copy(Path(__file__).with_suffix(".h"), folder / "cuda_rows.h")
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread")
    subprocess.run([compiler, *flags, "-o", folder / "kernels.so", folder / "kernels.cpp"], check=True)
    loaded = ctypes.CDLL(str(folder / "kernels.so"))

    def call_cuda(function, *arguments, sizes=(), typed=()):
        values = [library._c_value(value) for value in (*arguments, *sizes)]
        assert getattr(loaded, f"mimdet_{function}")(*values, None) == 0

    monkeypatch.setattr(library, "call_cuda", call_cuda)
