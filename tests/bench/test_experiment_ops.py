"""``mimdet bench ops``: times of correct implementations, statuses of the others."""

import dataclasses

import benchmark_ops
import pytest
import torch

from mimdet.bench import views
from mimdet.bench.cases import OPS, case, cases
from mimdet.bench.equality import differentiate, mismatch
from mimdet.bench.experiments import ops

TINY = {4: (2, 8, 3, 5), 3: (2, 11, 12), 2: (3, 40)}


def tiny(op, dtype="fp32"):
    rank = len(cases(op, dtype, 64, 64, (1,))[0].shape)
    return case(op, dtype, TINY[rank])


def options(tmp_path, **changes):
    return ops.Options(device="cpu", output=tmp_path / "ops.json", rounds=3, **changes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_every_implementation_of_every_operation_is_right_and_timed(tmp_path, limits, op, dtype):
    one = tiny(op, dtype)
    chosen = options(tmp_path, implementations=("eager", "cpp", *one.baselines))
    tables = list(ops.measure_case(one, chosen, limits))
    assert [rows[0]["direction"] for rows in tables] == list(one.moved)
    compiled = "aten_cpu" if one.kernels_op == "attention_varlen" else "cpp"
    for rows in tables:
        assert [row["implementation"] for row in rows] == ["eager", compiled, *one.baselines]
        for row in rows:
            assert row["status"] == "ok"
            assert len(row["samples_ms"]) == row["rounds"] == 3
            assert row["gb_s"] == pytest.approx(one.moved[row["direction"]] / row["p50_ms"] / 1e6, rel=1e-3)
        speedups = dict(
            zip((row["implementation"] for row in rows), map(views.speedup_over("eager", rows), rows), strict=True)
        )
        assert [name for name, speedup in speedups.items() if speedup is None] == ["eager"]


def test_what_is_wrong_gets_no_figure(tmp_path, monkeypatch, capsys):
    one = tiny("bias_gelu")

    def wrong(t):
        return (torch.nn.functional.gelu(t["x"] + t["bias"], approximate="tanh"),)

    def wrong_backward(t):
        return (torch.nn.functional.gelu(t["x"].detach() + t["bias"]) + 0 * t["x"],)

    def broken(t):
        raise RuntimeError("no such instruction\nsecond line")

    planted = dataclasses.replace(one, baselines={"tanh": wrong, "no gradient": wrong_backward, "broken": broken})
    monkeypatch.setitem(OPS, "bias_gelu", lambda *arguments: planted)
    chosen = options(tmp_path, ops=("bias_gelu",), shapes=((2, 11, 12),), implementations=("eager", *planted.baselines))
    rows = {(row["implementation"], row["direction"]): row for row in ops.run(chosen).rows}
    shown = capsys.readouterr().out
    for name, reason in {
        "tanh": "wrong: output 0: error",
        "no gradient": "wrong: gradient of x",
        "broken": "cannot run: RuntimeError: no such instruction",
    }.items():
        for direction in ops.DIRECTIONS:
            row = rows[name, direction]
            assert row["status"].startswith(reason)
            assert not {"p50_ms", "samples_ms", "gb_s", "of_limit", "peak_mib"} & set(row)
        assert reason.split(":")[0] in shown
    assert rows["eager", "forward"]["status"] == "ok"


@pytest.mark.parametrize("op", OPS)
def test_planted_errors_are_found(op):
    """One element off by a hundredth, or one index moved, in each output and gradient."""
    one = tiny(op)
    inputs = one.make("cpu")
    outputs = one.run(inputs, "eager")
    gradients = [torch.randn_like(o) for o in outputs] if one.differentiable else []
    actual = differentiate(lambda t: one.run(t, "eager"), inputs, one.differentiable, gradients, one.comparable)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = differentiate(
        lambda t: one.run(t, "eager"), double, one.differentiable, [g.double() for g in gradients], one.comparable
    )
    assert mismatch(actual, actual, exact, one.terms) is None
    for name, value in actual.items():
        spoilt, last = value.clone(), (-1,) * value.ndim
        if value.dtype == torch.bool:
            spoilt[last] = ~spoilt[last]
        else:
            spoilt[last] += 0.01 * value.abs().max() if value.is_floating_point() else 1
        assert mismatch(actual | {name: spoilt}, actual, exact, one.terms).startswith(name)
        if value.is_floating_point():
            spoilt[last] = float("nan")
            assert mismatch(actual | {name: spoilt}, actual, exact, one.terms).startswith(name)


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
def test_none_moves_less_than_its_inputs_and_outputs(op):
    """Bytes of the forward, counted from its tensors; indices and position embedding as often as they are read."""
    one = tiny(op)
    inputs = one.make("cpu")
    touched = sum(t.nbytes for t in [*inputs.values(), *one.run(inputs, "eager")])
    assert 0.3 * touched < one.moved["forward"] <= touched


def test_command_line(experiment):
    words = ("--op", "bias_gelu", "--shape", "1x16x24", "--rounds", 3, "--impl", "eager", "--impl", "cpp")
    out, results, _ = experiment("ops", *words, "--device", "cpu", suffix=".csv")
    for word in ("bias_gelu", "1x16x24", "A/A", "eager", "cpp", "of limit", "vs eager", "p20"):
        assert word in out
    assert {row["direction"] for row in results.rows} == {"forward", "backward"}
    assert results.command.endswith("--output ops.csv")


class Benchmark:
    """pytest-benchmark's fixture without timing."""

    group = None

    def __call__(self, run):
        self.result = run()


def test_developers_benchmark_is_checked_first_too():
    """pytest tests/bench/benchmark_ops.py: the same cases and implementations, each checked before it is timed."""
    parameters = {parameter.id: parameter.values for parameter in benchmark_ops.parameters()}
    assert {case.op for case, *_ in parameters.values()} == set(OPS)
    assert "scatter_fill-decoder-fp32-backward-original" in parameters
    one = tiny("scatter_fill")
    for direction, count in (("forward", 1), ("backward", len(one.differentiable))):
        benchmark = Benchmark()
        benchmark_ops.test_operation(benchmark, one, direction, "original")
        assert benchmark.group == f"scatter_fill given 2x11x12 fp32 {direction}"
        assert len(benchmark.result) == count
    wrong = dataclasses.replace(one, baselines={"wrong": lambda t: (one.run(t, "eager")[0] + 1,)})
    benchmark = Benchmark()
    with pytest.raises(pytest.fail.Exception, match="wrong: output 0"):
        benchmark_ops.test_operation(benchmark, wrong, "forward", "wrong")
    assert benchmark.group is None
