"""``mimdet bench packed`` on a model of one block."""

import pytest
from tiny_model import CONFIG, OVERRIDES

from mimdet.bench.experiments.packed import LAYOUTS
from mimdet.bench.plot import plot
from mimdet.bench.readme import render
from mimdet.bench.row import Results
from mimdet.modeling import MIMDetBackbone


@pytest.fixture
def measure(bench, tmp_path):
    """Run the command on three images; its results."""

    def run(*words):
        path = tmp_path / "packed.json"
        words = ("--size", "64x96", "--size", "96x64", "--size", "32x64", "--rounds", 3, *words)
        assert bench("packed", *words, "--config", CONFIG, "--device", "cpu", "--output", path, *OVERRIDES) == 0
        return Results.read(path)

    return run


def test_by_command(measure, tmp_path, capsys):
    results = measure()
    out = capsys.readouterr().out
    for word in ("backbone, train, 64x96 96x64 32x64", "inference", "A/A", "one by one", "speed vs canvas"):
        assert word in out
    assert [(row["mode"], row["implementation"]) for row in results.rows] == [
        (mode, layout) for mode in ("train", "inference") for layout in LAYOUTS
    ]
    for row in results.rows:
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == 3
        assert row["peak_mib"] > 0
    canvas, packed = results.rows[:2]
    assert packed["activation_mib"] < canvas["activation_mib"]
    assert "64x96 96x64 32x64, train, 0.5 | packed" in render(results)
    plot(results, tmp_path / "packed.png")
    assert (tmp_path / "packed.png").stat().st_size > 10_000


def test_a_wrong_result_is_not_timed(measure, monkeypatch, capsys):
    forward = MIMDetBackbone.forward

    def wrong(self, *args, **kwargs):
        features = forward(self, *args, **kwargs)
        return {k: v + 0.01 for k, v in features.items()} if self.batch_mode == "packed" else features

    monkeypatch.setattr(MIMDetBackbone, "forward", wrong)
    row = measure("--mode", "inference").rows[1]
    assert row["implementation"] == "packed"
    assert row["status"].startswith("wrong: c2 of image 0")
    assert "p50_ms" not in row
    assert "wrong: c2" in capsys.readouterr().out
