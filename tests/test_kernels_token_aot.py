"""The Triton kernels of token sampling, gather and assembly, compiled for GPUs that are not here."""

import importlib.util
import os

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"),
]

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"f32": (F32, F32), "bf16": (BF16, BF16), "bf16-f32": (BF16, F32)}
TARGETS = pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
# The widths of the Base and Large decoders and of the Base encoder, and one that nothing divides.
CHANNELS = pytest.mark.parametrize("channels", [768, 512, 17])


def pointer(dtype, count=1024):
    return torch.empty(count, dtype=dtype)


def check(made, wide, registers=64):
    assert made.stack == 0, made
    assert made.registers <= registers, made
    if wide:
        assert made.loads_16 > 0, made
        assert made.stores_16 > 0, made


@TARGETS
@CHANNELS
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("has_pos", [True, False], ids=["pos", "no-pos"])
def test_gather_add_pos_fwd(capability, channels, dtypes, has_pos):
    from kernels_aot import compile_for

    from mimdet.kernels.gather_add_pos import triton as k

    x, out = (pointer(d) for d in dtypes)
    made = compile_for(
        capability, k._gather_add_pos_fwd_kernel,
        x, out if has_pos else None, pointer(torch.int64), out, 4200, 2100, channels, 4200 * channels, channels,
        HAS_POS=has_pos, ROWS=k._ROWS, COLUMNS=k._COLUMNS, num_warps=4,
    )  # fmt: skip
    check(made, channels % 16 == 0)


@TARGETS
@CHANNELS
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_gather_add_pos_bwd(capability, channels, dtypes):
    from kernels_aot import compile_for

    from mimdet.kernels.gather_add_pos import triton as k

    out, grad = (pointer(d) for d in dtypes)
    made = compile_for(
        capability, k._gather_add_pos_bwd_kernel,
        grad, pointer(torch.int64), out, 4200, 2100, 4200, channels, ROWS=k._ROWS, COLUMNS=k._COLUMNS, num_warps=4,
    )  # fmt: skip
    check(made, channels % 16 == 0)


@TARGETS
@CHANNELS
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_scatter_fill_fwd(capability, channels, dtypes):
    from kernels_aot import compile_for

    from mimdet.kernels.scatter_fill import triton as k

    rows, out = (pointer(d) for d in dtypes)
    strides = 2100 * channels, channels, 2100 * channels, channels
    made = compile_for(
        capability, k._scatter_fill_fwd_kernel,
        rows, rows, pointer(torch.int64), out, out, 8400, 2100, 4200, channels, *strides,
        ROWS=k._ROWS, COLUMNS=k._COLUMNS, num_warps=4,
    )  # fmt: skip
    check(made, channels % 16 == 0, registers=80)


@TARGETS
@CHANNELS
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_scatter_fill_bwd(capability, channels, dtypes):
    from kernels_aot import compile_for

    from mimdet.kernels.scatter_fill import triton as k

    rows, grad = (pointer(d) for d in dtypes)
    made = compile_for(
        capability, k._scatter_fill_bwd_kernel,
        grad, pointer(torch.int64), rows, rows, 8400, 2100, 2100, 4200, channels,
        ROWS=k._ROWS, COLUMNS=k._COLUMNS, num_warps=4,
    )  # fmt: skip
    check(made, channels % 16 == 0)


@TARGETS
@pytest.mark.parametrize("packed", [False, True], ids=["canvas", "packed"])
@pytest.mark.parametrize("length", [1, 1200, 4200, 16384])
def test_sample_tokens(capability, length, packed):
    from kernels_aot import compile_for

    from mimdet.kernels.sample_tokens import triton as k

    noise, valid = torch.empty(2, length), torch.empty(2, length, dtype=torch.bool)
    keep, drop, restore = (torch.empty(2, n, dtype=torch.int64) for n in (max(1, length // 2), length // 2, length))
    offsets = torch.empty(2, 3, dtype=torch.int32) if packed else None
    arguments, constants = k._launch_arguments(noise, valid, offsets, keep, drop, restore)
    # One program a picture: how many fit on a multiprocessor does not matter.
    check(compile_for(capability, k._sample_tokens_kernel, *arguments, **constants), wide=False, registers=128)


def test_rows_lie_on_the_first_axis_of_the_grid():
    # The other axes end at 65535.
    from mimdet.kernels.gather_add_pos import triton as gather
    from mimdet.kernels.scatter_fill import triton as scatter

    for k in (gather, scatter):
        rows, columns = k._grid(2**31, 768)
        assert rows * k._ROWS >= 2**31
        assert columns * k._COLUMNS >= 768
        assert columns <= 65535
