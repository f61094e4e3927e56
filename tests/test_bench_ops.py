"""``mimdet bench ops``: figures for what is right, reasons for what is not."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import benchmark_ops
import pytest
import torch
from test_cli import run

from mimdet.bench import ops
from mimdet.bench.cases import DTYPES, OPS, case, cases
from mimdet.bench.equality import differentiate, why_wrong
from mimdet.bench.results import Results

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"copy_gb_s": 10.0, "gemm_float32_tflop_s": 0.1, "gemm_bfloat16_tflop_s": 0.2}
TINY = {4: (2, 8, 3, 5), 3: (2, 11, 12), 2: (3, 40)}


def tiny(op, dtype="fp32"):
    rank = len(cases(op, dtype, 64, 64, (1,))[0].shape)
    return case(op, dtype, TINY[rank])


def options(tmp_path, **changes):
    return ops.Options("cpu", tmp_path / "ops.json", rounds=3, limits=LIMITS, **changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_every_form_of_every_operation_is_right_and_timed(tmp_path, op, dtype):
    made = tiny(op, dtype)
    chosen = options(tmp_path, impls=("eager", "cpp", *made.peers))
    tables = list(ops.measure_case(made, chosen, LIMITS))
    assert [rows[0]["direction"] for rows in tables] == list(made.moved)
    for rows in tables:
        assert [row["impl"] for row in rows] == ["eager", "cpp", *made.peers]
        for row in rows:
            assert row["status"] == "ok"
            assert len(row["samples_ms"]) == row["rounds"] == 3
            assert row["gb_s"] == pytest.approx(made.moved[row["direction"]] / row["p50_ms"] / 1e6, rel=1e-3)
            assert (row["vs_eager"] is None) == (row["impl"] == "eager")


def test_a_wrong_form_gets_no_figure(tmp_path, monkeypatch, capsys):
    made = tiny("bias_gelu")

    def wrong(t):
        return (torch.nn.functional.gelu(t["x"] + t["bias"], approximate="tanh"),)

    def wrong_backward(t):
        return (torch.nn.functional.gelu(t["x"].detach() + t["bias"]) + 0 * t["x"],)

    def broken(t):
        raise RuntimeError("no such instruction\nsecond line")

    planted = dataclasses.replace(made, peers={"tanh": wrong, "no gradient": wrong_backward, "broken": broken})
    monkeypatch.setitem(OPS, "bias_gelu", lambda *arguments: planted)
    chosen = options(tmp_path, ops=("bias_gelu",), shapes=((2, 11, 12),), impls=("eager", *planted.peers))
    rows = {(row["impl"], row["direction"]): row for row in ops.run_ops(chosen).rows}
    shown = capsys.readouterr().out
    for name, reason in {
        "tanh": "wrong: output 0: error",
        "no gradient": "wrong: gradient of x",
        "broken": "cannot run: RuntimeError: no such instruction",
    }.items():
        for direction in ops.DIRECTIONS:
            row = rows[name, direction]
            assert row["status"].startswith(reason)
            assert row["p50_ms"] is row["gb_s"] is row["vs_eager"] is row["peak_mib"] is None
            assert row["samples_ms"] == []
        assert reason.split(":")[0] in shown
    assert rows["eager", "forward"]["status"] == "ok"


@pytest.mark.parametrize("op", OPS)
def test_planted_errors_are_found(op):
    """One element off by a hundredth, or one index moved, in each output and gradient."""
    made = tiny(op)
    inputs = made.make("cpu")
    outputs = made.run(inputs, "eager")
    gradients = [torch.randn_like(o) for o in outputs] if made.differentiable else []
    found = differentiate(lambda t: made.run(t, "eager"), inputs, made.differentiable, gradients, made.comparable)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = differentiate(
        lambda t: made.run(t, "eager"), double, made.differentiable, [g.double() for g in gradients], made.comparable
    )
    assert why_wrong(found, found, exact, made.terms) is None
    for name, value in found.items():
        spoilt, last = value.clone(), (-1,) * value.ndim
        spoilt[last] += 0.01 * value.abs().max() if value.is_floating_point() else 1
        assert why_wrong(found | {name: spoilt}, found, exact, made.terms).startswith(name)
        if value.is_floating_point():
            spoilt[last] = float("nan")
            assert why_wrong(found | {name: spoilt}, found, exact, made.terms).startswith(name)


def test_shapes_are_the_models():
    assert [c.shape for c in cases("bias_gelu", "fp32", 800, 1344, (1, 2))] == [
        (1, 2100, 3072), (1, 4200, 2048), (2, 2100, 3072), (2, 4200, 2048),
    ]  # fmt: skip
    assert [c.shape for c in cases("attention_varlen", "fp32", 800, 1344, (1, 2))] == [
        (1, 2100, 12, 64), (1, 4200, 16, 32), (2, 2100, 12, 64), (2, 4200, 16, 32),
    ]  # fmt: skip
    assert [c.shape for c in cases("group_norm_gelu", "fp32", 800, 1344, (1,))] == [
        (1, 96, 400, 672), (1, 192, 200, 336), (1, 384, 100, 168), (1, 768, 50, 84),
    ]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_no_form_moves_less_than_its_inputs_and_outputs(op):
    """The forward's bytes, from the tensors themselves; indices and the position table as they are read."""
    made = tiny(op)
    inputs = made.make("cpu")
    touched = sum(t.nbytes for t in [*inputs.values(), *made.run(inputs, "eager")])
    assert 0.3 * touched < made.moved["forward"] <= touched
    assert set(DTYPES) == {"fp32", "bf16", "fp16"}


def test_command_line(monkeypatch, tmp_path, capsys):
    path = tmp_path / "figures.csv"
    monkeypatch.setattr("mimdet.bench.ops.measure_limits", lambda device, dtypes: LIMITS)
    status = run(
        monkeypatch, "bench", "ops", "--op", "bias_gelu", "--shape", "1x16x24", "--rounds", 3, "--device", "cpu",
        "--impl", "eager", "--impl", "cpp", "--output", path,
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    for word in ("bias_gelu", "1x16x24", "A/A", "eager", "cpp", "of limit", "vs eager"):
        assert word in out
    found = Results.read(path)
    assert {row["direction"] for row in found.rows} == {"forward", "backward"}
    assert found.command.endswith("--output figures.csv")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "cake"], "no operation 'cake'; choose from add_layer_norm"),
        (["--op", "bias_gelu", "--shape", "1xtwo"], "sizes are numbers with x between them"),
        (["--op", "bias_gelu", "--shape", "2x3"], "the shape must have 3 positive sizes, got 2x3"),
        (["--dtype", "int8"], "no dtype 'int8'"),
        (["--direction", "up"], "no direction up"),
        (["--size", "100x100"], "multiples of 32"),
        (["--output", "x.txt"], "must end in .json or .csv"),
        (
            ["--op", "bias_gelu", "--shape", "1x2x8", "--impl", "magic"],
            "bias_gelu has no form magic here; it has eager",
        ),
    ],
    ids=["op", "shape", "rank", "dtype", "direction", "size", "output", "impl"],
)
def test_errors_are_one_message(monkeypatch, capsys, argv, message):
    monkeypatch.setattr("mimdet.bench.ops.measure_limits", lambda device, dtypes: LIMITS)
    assert run(monkeypatch, "bench", "ops", "--device", "cpu", *argv) == 1
    assert message in capsys.readouterr().err


class Benchmark:
    """The fixture of pytest-benchmark, without its clock."""

    group = None

    def __call__(self, run):
        self.result = run()


def test_developers_benchmark_is_checked_first_too():
    """pytest tests/benchmark_ops.py: the same cases and forms, each of them right before it is timed."""
    found = {parameter.id: parameter.values for parameter in benchmark_ops.parameters()}
    assert {case.op for case, *_ in found.values()} == set(OPS)
    assert "scatter_fill-decoder-fp32-backward-original" in found
    made = tiny("scatter_fill")
    for direction, count in (("forward", 1), ("backward", len(made.differentiable))):
        benchmark = Benchmark()
        benchmark_ops.test_operation(benchmark, made, direction, "original")
        assert benchmark.group == f"scatter_fill given 2x11x12 fp32 {direction}"
        assert len(benchmark.result) == count
    wrong = dataclasses.replace(made, peers={"wrong": lambda t: (made.run(t, "eager")[0] + 1,)})
    benchmark = Benchmark()
    with pytest.raises(pytest.fail.Exception, match="wrong: output 0"):
        benchmark_ops.test_operation(benchmark, wrong, "forward", "wrong")
    assert benchmark.group is None


def test_runs_from_a_checkout_without_installing():
    command = [sys.executable, "-m", "mimdet.bench", "ops", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--direction" in done.stdout
    shadow = subprocess.run([sys.executable, "-c", "import bench"], cwd=ROOT, capture_output=True, text=True)
    assert "this folder is mimdet.bench" in shadow.stderr
