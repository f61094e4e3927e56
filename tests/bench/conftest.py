"""``mimdet bench`` as fixtures, with fixed machine limits."""

from functools import partial

import pytest
from support.command import run

from mimdet.bench import session
from mimdet.bench.plot import plot
from mimdet.bench.readme import render
from mimdet.bench.row import Results

LIMITS = {"copy_gb_s": 10.0, "gemm_float32_tflop_s": 0.1, "gemm_bfloat16_tflop_s": 0.2}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(session, "measure_limits", lambda device, dtypes: LIMITS)
    return LIMITS


@pytest.fixture
def bench(monkeypatch):
    """Run ``mimdet bench words...``; its exit status."""

    return partial(run, monkeypatch, "bench")


@pytest.fixture
def experiment(bench, tmp_path, capsys):
    """Run a command that measures: what it prints, its results, and their table in Markdown. They can be drawn."""

    def measured(*words, suffix=".json"):
        path = tmp_path / f"{words[0]}{suffix}"
        assert bench(*words, "--output", path) == 0
        out, results = capsys.readouterr().out, Results.read(path)
        plot(results, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 10_000
        return out, results, render(results)

    return measured
