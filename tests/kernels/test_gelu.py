"""GELU inside the Triton and CUDA kernels: its instructions, and its numbers in csrc/cuda_gelu.h."""

import ctypes
import subprocess

import pytest
import torch
from support.gelu_everywhere import all_numbers, check_everywhere
from support.kernels import BF16, F16, needs_compiler

from mimdet.kernels import build

# Instructions for a number, with its load, conversions and store, of forward and of backward. erf takes 37 and 48.
MOST_INSTRUCTIONS = (22, 29)


@needs_compiler
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_instructions(dtype):
    from support import gelu_kernels
    from support.aot import instructions

    x = torch.empty(16, dtype=dtype)
    launches = (gelu_kernels.forward, (x, x)), (gelu_kernels.backward, (x, x, x))
    for (kernel, tensors), most in zip(launches, MOST_INSTRUCTIONS, strict=True):
        code = instructions(90, kernel, *tensors, 1024, block=1024, num_warps=4)
        print(kernel.__name__, len(code) / 8)  # 128 threads of 8 numbers
        assert len(code) <= 8 * most
        assert "CALL" not in " ".join(code)


HEADER_ON_CPU = """
#include <cmath>
#include <cstdint>
#define __device__
#define __forceinline__ inline
#include "cuda_gelu.h"
extern "C" void run(const float* z, float* y, float* derivative, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    y[i] = mimdet::gelu(z[i]);
    derivative[i] = mimdet::gelu_derivative(z[i]);
  }
}
"""


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_cuda_header_at_every_16_bit_number(dtype, tmp_path):
    compiler = build.shutil.which("c++") or build.shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "gelu.cpp").write_text(HEADER_ON_CPU)
    library = tmp_path / "gelu.so"
    command = [
        compiler,
        "-std=c++17",
        "-O2",
        "-shared",
        "-fPIC",
        f"-I{build.CSRC}",
        "-o",
        library,
        tmp_path / "gelu.cpp",
    ]
    subprocess.run(command, check=True)
    z = all_numbers(dtype)
    inputs, y, derivative = z.float(), *(torch.empty(z.shape) for _ in range(2))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (inputs, y, derivative))
    ctypes.CDLL(str(library)).run(*pointers, ctypes.c_int64(z.numel()))
    check_everywhere(z, y.to(dtype), derivative.to(dtype))
