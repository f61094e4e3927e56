"""``mimdet bench static``: machine code read, walked and judged.

``CEILINGS`` holds what the hot kernels must keep. After a change of a kernel, this prints the table anew:
``python tests/bench/test_experiment_static.py``
"""

import importlib.util
import math
import os
import sys
from functools import cache

import pytest
import torch
from tiny_model import CONFIG, OVERRIDES

from mimdet.bench import cuda_launches, launch_cost, machine_code
from mimdet.bench.compare import compare
from mimdet.bench.experiments import static
from mimdet.bench.gpu_model import GPUS, Executed, blocks_per_sm, predict, tensor_flop
from mimdet.bench.machine_code import Binary, Pointer
from mimdet.bench.real_launches import operation_of, record
from mimdet.bench.row import Results
from mimdet.bench.sass import REGION, Code, Instruction
from mimdet.kernels import OPS, build
from mimdet.kernels.ahead import Launch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# Kernel at its largest launch in a step of MIMDet-Base, batch 1, bf16, sm_90 -> least bits of the loads and of the
# stores that move the most bytes, and most executed instructions of a thread for an element of the largest tensor. The
# largest launch is that whose tensors have the most elements together.
CEILINGS = {
    "add_layer_norm_bwd": (128, 128, 37.4),
    "add_layer_norm_fwd": (128, 128, 30.3),
    "attention_varlen_bwd_kv": (128, 128, 1011.3),
    "attention_varlen_bwd_q": (128, 128, 1036.0),
    "attention_varlen_fwd": (128, 128, 1033.9),
    "batch_norm_bwd": (128, 128, 15.4),
    "batch_norm_fwd": (128, 128, 9.6),
    "bias_gelu_bwd": (128, 128, 32.1),
    "bias_gelu_fwd": (128, 128, 24.4),
    "gather_rows": (128, 128, 13.8),
    "group_norm_gelu_bwd_dx": (128, 128, 37.3),
    "group_norm_gelu_bwd_sums": (128, 32, 33.4),
    "group_norm_gelu_fwd": (128, 128, 27.0),
    "scatter_rows": (128, 128, 6.7),
}


def options(**changes):
    return static.Options(
        **{"device": "cpu", "size": (800, 1344), "batch": 1, "implementations": ("triton",)} | changes
    )


def tiny_options(output, **changes):
    return options(config=CONFIG, overrides=OVERRIDES, size=(64, 96), output=output, **changes)


@cache
def hot_rows():
    """The largest launch of each hot kernel at the model's real shapes."""
    largest = {}
    for one in record(options(), ("triton",), 90):
        name = one.launch.kernel.__name__.strip("_").removesuffix("_kernel")
        count = sum(t.count for t in static._tensors(one.launch.arguments))
        if name in CEILINGS and count > largest.get(name, (0, None))[0]:
            largest[name] = count, one
    return {name: static._rows_of_launch(options(), one)[0] for name, (_, one) in largest.items()}


def measured_ceiling(row):
    """Its entry of ``CEILINGS``: two in a hundred above what it executes."""
    return row["load_bits"], row["store_bits"], round(1.02 * row["instructions_per_element"], 1)


@pytest.mark.parametrize("name", CEILINGS)
def test_hot_kernels_keep_their_code(name):
    row = hot_rows()[name]
    loads, stores, ceiling = CEILINGS[name]
    assert row["spills"] == 0
    assert row["load_bits"] >= loads
    assert row["store_bits"] >= stores
    assert row["instructions_per_element"] <= ceiling


def code(*lines):
    """Machine code of these lines; "name:" is a label."""
    text, address = [], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{address:04x}*/    {line} ;   /* 0x0 */")
            address += 16
    return Code("\n".join(text))


def executed(of, constants=(), special=(), memory=lambda address, size: None):
    walk = of.walk(dict(constants), {"SR_TID.X": 0, "SR_CTAID.X": 0, **dict(special)}, memory)
    return walk.executed, walk


LOOP = ("MOV R0, RZ", ".L_0:", "IADD3 R0, R0, 0x1, RZ", "ISETP.LT.AND P0, PT, R0, c[0x0][0x210], PT",
        "@P0 BRA `(.L_0)", "EXIT")  # fmt: skip
# Four at a time, then one at a time, as ptxas unrolls.
UNROLLED = (
    "ULDC UR4, c[0x0][0x210]", "LOP3.LUT R3, R3, 0x3, RZ, 0xc0, !PT", "MOV R3, UR4",
    "ISETP.GE.U32.AND P0, PT, R3, 0x4, PT", "@!P0 BRA `(.L_1)", ".L_0:", "VIADD R3, R3, 0xfffffffc",
    "ISETP.GT.U32.AND P0, PT, R3, 0x3, PT", "@P0 BRA `(.L_0)", ".L_1:", "ISETP.NE.AND P1, PT, R3, RZ, PT",
    "@!P1 EXIT", ".L_2:", "IADD3 R3, R3, -0x1, RZ", "ISETP.NE.AND P1, PT, R3, RZ, PT", "@P1 BRA `(.L_2)", "EXIT",
)  # fmt: skip
# To 2**32 + 2.
LONG = ("MOV R0, 0xfffffffe", "MOV R1, RZ", ".L_0:", "IADD3 R0, P0, R0, 0x1, RZ", "IADD3.X R1, RZ, R1, RZ, P0, !PT",
        "ISETP.GE.U32.AND P1, PT, R0, 0x2, PT", "ISETP.GE.U32.AND.EX P1, PT, R1, 0x1, PT, P1", "@!P1 BRA `(.L_0)",
        "EXIT")  # fmt: skip
# A subtraction of zero carries.
ZERO = ("MOV R2, 0x7", "MOV R3, 0x5", "IADD3 R0, P0, R2, -RZ, RZ", "IADD3.X R1, R3, ~RZ, RZ, P0, !PT",
        "ISETP.NE.AND P0, PT, R1, 0x5, PT", "@P0 EXIT", "NOP", "EXIT")  # fmt: skip
# A rare branch around a call is taken.
RARE = ("FSETP.GT.AND P0, PT, R1, 1, PT", "@!P0 BRA `(.L_1)", "CALL.REL.NOINC `(slow)", ".L_1:", "EXIT", "slow:",
        "NOP", "RET.REL.NODEC R2 `(kernel)")  # fmt: skip
CALL = ("MOV R2, 0x20", "CALL.REL.NOINC `(slow)", "EXIT", "slow:", "NOP", "RET.REL.NODEC R2 `(kernel)")


@pytest.mark.parametrize(
    ("lines", "argument", "expected"),
    [
        *((LOOP, trips, [1, trips, trips, trips, 1]) for trips in (1, 7, 100)),
        (UNROLLED, 11, [1] * 5 + [2] * 3 + [1] * 2 + [3] * 3 + [1]),
        (UNROLLED, 3, [1] * 5 + [0] * 3 + [1] * 2 + [3] * 3 + [1]),
        (LONG, 0, [1, 1, *[4] * 5, 1]),
        (ZERO, 0, [1] * 8),
        (RARE, 0, [1, 1, 0, 1, 0, 0]),
        (CALL, 0, [1] * 5),
    ],
)
def test_instructions_count_as_often_as_they_run(lines, argument, expected):
    assert executed(code(*lines), {0x210: argument})[0] == expected


def test_a_loop_that_data_ends_counts_once_and_is_reported():
    counts, walk = executed(code(*LOOP))
    assert counts == [1, 1, 1, 1, 1]
    assert walk.unknown == {1}


@pytest.mark.parametrize(("value", "divisor"), [(100, 7), (4294967295, 3), (768, 768), (5, 9), (2**31 + 11, 65537)])
def test_division_by_a_reciprocal_is_followed(value, divisor):
    """As ptxas divides by a number that it does not know: the loop runs quotient times."""
    of = code(
        "ULDC UR4, c[0x0][0x210]", "ULDC UR5, c[0x0][0x214]", "I2F.U32.RP R7, UR5", "MUFU.RCP R7, R7",
        "VIADD R2, R7, 0xffffffe", "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "HFMA2.MMA R2, -RZ, RZ, 0, 0",
        "IADD3 R9, RZ, -R3, RZ", "IMAD R9, R9, UR5, RZ", "IMAD.HI.U32 R3, R3, R9, R2", "MOV R8, UR4",
        "IMAD.HI.U32 R3, R3, R8, RZ", "IMAD.MOV R5, RZ, RZ, -R3", "IMAD R8, R5, UR5, R8",
        "ISETP.GE.U32.AND P0, PT, R8, UR5, PT", "@P0 IADD3 R8, R8, -UR5, RZ", "@P0 IADD3 R3, R3, 0x1, RZ",
        "ISETP.GE.U32.AND P1, PT, R8, UR5, PT", "@P1 IADD3 R3, R3, 0x1, RZ",
        "STG.E desc[UR6][R10.64], R3", "MOV R10, RZ", "MOV R11, R3", "LDG.E R0, desc[UR6][R10.64]", "EXIT",
    )  # fmt: skip
    seen = []
    executed(of, {0x210: value, 0x214: divisor}, memory=lambda address, size: seen.append(address >> 32))
    assert seen == [value // divisor]


def test_loads_and_stores_are_those_of_their_tensors():
    of = code(
        "MOV R3, 0x200", "MOV R2, 0x10", "@P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]", "LDG.E.U16 R8, [R6.64]",
        "STG.E.64 desc[UR4][R2.64], R4", "@!PT STG.E.64 desc[UR4][R2.64], R4",
        "LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64], !PT", "EXIT",
    )  # fmt: skip
    _, walk = executed(of)
    assert walk.touched == {(2, 2): 1, (3, None): 1, (4, 2): 1}
    assert [of.instructions[i].bits for i in (2, 3, 4)] == [128, 16, 64]


def test_a_warp_waits_for_what_it_needs():
    """The encoding's upper half: stall counts, the barrier that a load sets, barriers that an instruction waits for."""

    def control(stall, sets=7, waits=0):
        return (stall | 1 << 4 | sets << 5 | 7 << 8 | waits << 11) << 41

    lines = ("LDG.E R0, [R2.64]", control(2, sets=0)), ("FADD R1, R0, R0", control(5, waits=1)), ("EXIT", control(1))
    text = "\n".join(
        f"/*{16 * i:04x}*/ {line} ; /* 0x0000000000000001 */\n /* 0x{word:016x} */"
        for i, (line, word) in enumerate(lines)
    )
    assert Code(text).walk({}, {}, latencies={"global": 400}).cycles == 400 + 5 + 1


def test_what_is_no_disassembly_and_what_never_ends(monkeypatch):
    with pytest.raises(ValueError, match="no instructions in this disassembly"):
        Code("hello")
    monkeypatch.setattr("mimdet.bench.sass._MOST_STEPS", 1000)
    with pytest.raises(RuntimeError, match="over 1000 instructions"):
        executed(code("NOP", ".L_0:", "NOP", "BRA `(.L_0)", "EXIT"))


def binary(registers=32, shared=0, warps=4, text=""):
    return Binary("kernel", registers, 0, shared, warps, text, parameters=((0x210, 8), (0x218, 8), (0x220, 4)))


def test_blocks_that_fit():
    h200 = GPUS["sm_90"]
    assert blocks_per_sm(h200, 32, 0, 4) == 16  # 64 warps
    assert blocks_per_sm(h200, 32, 0, 1) == 32  # blocks
    assert blocks_per_sm(h200, 168, 0, 4) == 3  # 21 * 256 registers a warp: 12 warps
    assert blocks_per_sm(h200, 163, 0, 4) == 3  # allocated as 168
    assert blocks_per_sm(h200, 32, 113 * 1024, 4) == 2  # and 1 KiB each
    assert blocks_per_sm(h200, 32, 228 * 1024, 4) == 0
    assert blocks_per_sm(GPUS["sm_89"], 32, 0, 4) == 12  # 48 warps
    with pytest.raises(ValueError, match="a block needs more registers or shared memory than a H200"):
        predict(h200, binary(shared=228 * 1024), 264, Executed())


@pytest.mark.parametrize(
    ("bound", "blocks", "counts", "clocks"),
    [
        ("issue", 264, {"instructions": 100.0}, 2 * 4 * 100 / 4),
        ("mufu", 264, {"mufu": 100.0, "instructions": 150.0}, 2 * 4 * 100 * 32 / 16),
        ("tensor", 264, {"flop": 4096.0 * 50}, 2 * 50),
        ("latency", 132 * 16 + 1, {"cycles": 1000}, 2 * 1000),
        ("issue", 133, {"instructions": 100.0}, 2 * 4 * 100 / 4),  # one multiprocessor has two
    ],
)
def test_the_longest_term_is_the_prediction(bound, blocks, counts, clocks):
    predicted = predict(GPUS["sm_90"], binary(), blocks, Executed(**counts))
    assert predicted.bound == bound
    assert predicted.predicted_us == pytest.approx(clocks / 1755)


def test_memory_and_the_minimum():
    predicted = predict(GPUS["sm_90"], binary(), 264, Executed(minimum_bytes=4.8e6, instructions=1.0))
    assert (predicted.bound, predicted.minimum_us) == ("memory", pytest.approx(1.0))
    assert predicted.waves == pytest.approx(264 / (132 * 16))
    assert predicted.warps_per_sm == 8  # two blocks, though more would fit
    predicted = predict(GPUS["sm_90"], binary(), 132, Executed(flop=4096.0 * 1755, instructions=9e3))
    assert predicted.minimum_us == pytest.approx(1.0), "tensor cores, all of them busy"


@pytest.mark.parametrize(
    ("name", "flop"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 / 4),
        ("HGMMA.64x32x8.F32.TF32", 2 * 2 * 64 * 32 * 8 / 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 2 * 16 * 8 * 8),
        ("FFMA", 0),
        ("HFMA2.MMA", 0),
    ],
)
def test_products_of_tensor_cores(name, flop):
    assert tensor_flop(Instruction(0, "", name, ())) == flop


def test_every_gpu_names_its_source():
    assert list(GPUS) == ["sm_80", "sm_89", "sm_90", "sm_100"]
    assert all(gpu.source and set(gpu.latency) == {"global", "shared", "other"} for gpu in GPUS.values())
    dense = {arch: gpu.sms * gpu.ghz * gpu.tensor_flop / 1e3 for arch, gpu in GPUS.items()}
    assert dense == pytest.approx({"sm_80": 312, "sm_89": 362, "sm_90": 949, "sm_100": 2250}, rel=0.02)


def test_a_grid_is_the_sum_of_its_blocks():
    """Each block adds 128 of 300 numbers: the last has 44, of which its first two warps have some."""
    lines = ("S2R R0, SR_TID.X", "S2R R1, SR_CTAID.X", "IMAD R0, R1, 0x80, R0",
             "ISETP.GE.AND P0, PT, R0, c[0x0][0x220], PT", "@P0 EXIT",
             "IMAD.WIDE R2, R0, 0x4, c[0x0][0x210]", "LDG.E R4, [R2.64]", "MUFU.EX2 R4, R4",
             "IMAD.WIDE R2, R0, 0x4, c[0x0][0x218]", "STG.E [R2.64], R4", "EXIT")  # fmt: skip
    text = "\n".join(f"/*{16 * i:04x}*/ {line} ; /* 0x0 */" for i, line in enumerate(lines))
    values = [2 << REGION, 3 << REGION, 300]
    total = launch_cost.execute(GPUS["sm_90"], binary(text=text), (3,), (128,), values, {2: 1200, 3: 1200})
    assert total.mufu == pytest.approx((4 + 4 + 2) / 12)
    assert total.instructions == pytest.approx((10 * 11 + 2 * 5) / 12)
    assert total.loaded == {32: pytest.approx(10 * 128)}
    assert total.minimum_bytes == pytest.approx(2 * 1200)


def test_bytes_of_addresses_that_depend_on_data():
    """A gather reads as much as it loads, and no more than there is."""
    assert launch_cost._least({None: 100.0, 2: 8.0}, {2: 8, 3: 1000}) == 108
    assert launch_cost._least({None: 5000.0, 2: 800.0}, {2: 8, 3: 1000}) == 1008


@pytest.mark.parametrize(
    ("name", "expected"),
    [("batch_norm_sums", ("batch_norm", "backward")), ("bias_gelu", ("bias_gelu", "forward")),
     ("group_norm_gelu_backward", ("group_norm_gelu", "backward"))],
)  # fmt: skip
def test_operators_belong_to_operations(name, expected):
    assert operation_of(name) == expected


@cache
def tiny_step():
    """Launches of a small detector's step."""
    return record(tiny_options(None), ("triton", "cuda"), 90)


def test_a_step_launches_every_operation_of_its_config():
    """Maps are channels_last, as cuDNN's convolutions leave them."""
    launched = {(one.operation, one.direction) for one in tiny_step()}
    absent = {"layer_norm_gelu"}  # of another config
    assert {operation for operation, _ in launched} == set(OPS) - absent - {
        "attention_varlen_packed",
        "sample_packed_tokens",
    }
    norm = next(one for one in tiny_step() if one.operation == "group_norm_gelu" and one.implementation == "triton")
    image = norm.launch.named()["x"]
    assert image.stride[1] == 1
    assert norm.count >= 1


def few(*operations):
    """Launches of ``operations``, for a run in seconds."""
    return [one for one in tiny_step() if one.operation in operations]


@pytest.fixture
def small(monkeypatch):
    """``record`` gives the launches of one operation, in this process."""
    monkeypatch.setattr(static, "record", lambda options, implementations, capability: [
        one for one in few("bias_gelu") if one.implementation in implementations
    ])  # fmt: skip
    monkeypatch.setenv("MAX_JOBS", "1")


def test_the_command_writes_rows_that_compare_and_plot(small, experiment):
    out, results, _ = experiment("static", "--impl", "triton", "--batch", 1, "--batch", 2)
    assert "bias_gelu_fwd" in out
    assert {row["batch"] for row in results.rows} == {1, 2}
    assert {row["direction"] for row in results.rows} == {"forward", "backward"}
    for row in results.rows:
        assert row["arch"] == "sm_90"
        assert row["spills"] == 0
        assert row["of_limit"] == pytest.approx(row["minimum_us"] / row["predicted_us"], abs=1e-2)
        assert row["bound"] in static.BOUNDS
        assert row["minimum_bytes"] <= row["bytes"] * 1.001
        assert "measured_us" not in row
    assert "machine code for sm_90, a model of the H200" in results.environment["device"]
    changes = compare(results, results)
    assert len(changes) == len(results.rows)
    assert all(change["before_predicted us"] == change["after_predicted us"] > 0 for change in changes)


def test_amd_has_resources_and_no_prediction(small, bench, tmp_path):
    assert bench("static", "--impl", "triton", "--arch", "gfx942", "--output", tmp_path / "a.json") == 0
    rows = Results.read(tmp_path / "a.json").rows
    assert all(row["registers"] > 0 and row["spills"] == 0 and "predicted_us" not in row for row in rows)


def test_without_nvcc_tritons_rows_are_there(small, bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    static.cuda_library.cache_clear()
    assert bench("static", "--output", tmp_path / "a.json") == 0
    assert "without the CUDA C++ kernels: no nvcc found" in capsys.readouterr().out
    assert {row["implementation"] for row in Results.read(tmp_path / "a.json").rows} == {"triton"}
    assert bench("static", "--impl", "cuda", "--output", tmp_path / "b.json") == 1
    assert "nothing to compile: no nvcc found" in capsys.readouterr().err


def test_bad_input_is_one_line(bench, monkeypatch, capsys, tmp_path):
    def error(*words):
        assert bench("static", *words, "--output", tmp_path / "a.json") == 1
        message = capsys.readouterr().err
        assert len(message.strip().splitlines()) == 1
        return message

    with monkeypatch.context() as patch:
        patch.setattr(static, "record", lambda *_: [])
        assert "a training step of mimdet_b_mask_rcnn launches no kernel" in error("--impl", "triton")
    with monkeypatch.context() as patch:
        patch.setattr("triton.__file__", str(tmp_path / "triton" / "__init__.py"))
        assert "cuobjdump is missing (reinstall Triton" in error("--impl", "triton")
    with monkeypatch.context() as patch:
        patch.setattr(machine_code.importlib.util, "find_spec", lambda name: None)
        assert "Triton is not installed (pip install triton)" in error()
    with monkeypatch.context() as patch:
        patch.setattr("triton.knobs.runtime.interpret", True)
        assert "Triton's interpreter compiles nothing (unset TRITON_INTERPRET)" in error()


def test_tuples_are_passed_one_by_one():
    assert static._passed((1, (2, 3)), ("i32", ("constexpr", "*bf16"))) == [1, 3]
    values = launch_cost.parameter_values([-1, None, 0.5, True], (4, 8, 4, 4))
    assert values == [0xFFFFFFFF, None, None, 1]


def test_a_launch_is_timed_with_tensors_of_its_shapes(monkeypatch):
    """The part that needs a GPU, on the CPU with a kernel that notes its arguments."""
    seen = []

    class Kernel:
        arg_names = ("x", "cu_seqlens", "T", "pair")

        def __getitem__(self, grid):
            return lambda *arguments, **constants: seen.append((grid, arguments, constants))

    x = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    arguments = Pointer(x, 1), Pointer(torch.empty(3, dtype=torch.int32), 2), 10, (Pointer(x, 3), 1)
    launch = Launch(Kernel(), (7,), arguments, {"BLOCK": 32})
    assert static.measured_us(launch, "cpu", lambda run: run() or 0.25) == 250.0
    ((grid, (image, bounds, total, pair), constants),) = seen
    assert (grid, total, constants) == ((7,), 10, {"BLOCK": 32})
    assert image.stride() == x.stride()
    assert bounds.tolist() == [0, 5, 10]
    assert pair[0].shape == x.shape
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert static._on_this_gpu("sm_90")
    assert not static._on_this_gpu("sm_80")


@pytest.mark.skipif(build.find_nvcc() is None, reason="no nvcc (install the CUDA toolkit, or set CUDA_HOME)")
def test_cuda_kernels_are_launched_by_their_host_code():
    forward, *_ = (one for one in few("bias_gelu") if one.implementation == "cuda" and one.direction == "forward")
    (compiled,) = static.compile_launch("sm_90", forward)
    x = static._tensors(forward.launch.arguments)[0]
    assert (compiled.kernel, compiled.case) == ("bias_gelu_fwd", "bf16, 8") or compiled.case.startswith("bf16, ")
    width = int(compiled.case.removeprefix("bf16, "))
    rows_of_a_block = 4
    columns = -(-x.shape[-1] // width)
    assert compiled.grid == (math.ceil(x.count / x.shape[-1] / rows_of_a_block), math.ceil(columns / 256), 1)
    assert compiled.block == (32 * math.ceil(columns / 32), 1, 1)
    assert compiled.arguments[0] == x.address
    assert x.shape[-1] in compiled.arguments
    row = static._row(options(implementations=("cuda",)), forward, compiled)
    assert row["implementation"] == "cuda"
    assert row["spills"] == 0
    assert row["instructions_per_element"] > 5


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++ is Linux's")
def test_names_of_kernels_are_readable():
    name = "_ZN6mimdet12_GLOBAL__N_13fwdI13__nv_bfloat16Li8EEEvPKT_PKfPS2_ll"
    assert cuda_launches._readable(name) == ("fwd", "bf16, 8")
    assert cuda_launches._readable("plain") == ("plain", "")
    assert static._full_name("nms_slots", "nms_slots_pairs_kernel") == "nms_slots_pairs"
    assert static._full_name("bias_gelu", "fwd") == "bias_gelu_fwd"


@pytest.mark.parametrize("jobs", [1, 2])
def test_kernels_are_compiled_by_several_processes_and_stay_in_order(monkeypatch, jobs):
    monkeypatch.setenv("MAX_JOBS", str(jobs))
    results = list(static._in_processes(lambda number: (2 * number, os.getpid()), range(4)))
    assert [number for number, _ in results] == [0, 2, 4, 6]
    assert (os.getpid() in {process for _, process in results}) == (jobs == 1)


def test_a_page_shows_the_launches_that_take_most_of_the_step():
    rows = [
        {"operation": operation, "shape": f"{shape} bf16", "launches": launches, "predicted_us": us}
        for operation, shape, launches, us in (
            ("bias_gelu", "1x4", 1, 5.0), ("bias_gelu", "2x8", 4, 2.0), ("bias_gelu", "3x8", 1, 6.0),
            ("attention_varlen", "9x12x64", 12, 1.0), ("attention_varlen", "9x16x32", 4, 1.0),
        )
    ]  # fmt: skip
    assert [row["shape"] for row in static.published(rows)] == ["2x8 bf16", "9x12x64 bf16", "9x16x32 bf16"]


if __name__ == "__main__":
    for kernel, row in sorted(hot_rows().items()):
        print(f'    "{kernel}": {measured_ceiling(row)},')
    sys.exit(0)
