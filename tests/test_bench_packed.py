"""``mimdet bench packed`` and memory counted without timing, on a model of one block."""

import pytest
from test_bench_backbone import LIMITS, OVERRIDES
from test_cli import run

from mimdet.bench import backbone, packed
from mimdet.bench.plot import plot
from mimdet.bench.readme import render
from mimdet.bench.results import Results
from mimdet.modeling import MIMDetBackbone


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    for module in (packed, backbone):
        monkeypatch.setattr(module, "measure_limits", lambda device, dtypes: LIMITS)


def bench(monkeypatch, path, *words):
    common = ("--config", "mimdet_tiny_mask_rcnn", "--device", "cpu", "--output", path)
    return run(monkeypatch, "bench", *words, *common, *OVERRIDES)


SIZES = ("--size", "64x96", "--size", "96x64", "--size", "32x64", "--rounds", 3)


def test_by_command(monkeypatch, tmp_path, capsys):
    path = tmp_path / "packed.json"
    assert bench(monkeypatch, path, "packed", *SIZES) == 0
    out = capsys.readouterr().out
    for word in ("backbone, train, 64x96 96x64 32x64", "inference", "A/A", "one by one", "speed vs canvas"):
        assert word in out
    results = Results.read(path)
    assert [(row["mode"], row["form"]) for row in results.rows] == [
        (mode, form) for mode in ("train", "inference") for form in packed.FORMS
    ]
    for row in results.rows:
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == 3
        assert row["peak_mib"] > 0
        assert (row["vs_canvas"] is None) == (row["form"] == "canvas")
    canvas, own = results.rows[:2]
    assert own["saved_mib"] < canvas["saved_mib"]
    assert "64x96 96x64 32x64, train, 0.5 | packed" in render(results)
    plot(results, tmp_path / "packed.png")
    assert (tmp_path / "packed.png").stat().st_size > 10_000


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path, capsys):
    forward = MIMDetBackbone.forward

    def wrong(self, *args):
        features = forward(self, *args)
        return {k: v + 0.01 for k, v in features.items()} if self.batch_mode == "packed" else features

    monkeypatch.setattr(MIMDetBackbone, "forward", wrong)
    path = tmp_path / "packed.json"
    assert bench(monkeypatch, path, "packed", *SIZES, "--mode", "inference") == 0
    row = Results.read(path).rows[1]
    assert row["form"] == "packed"
    assert row["status"].startswith("wrong: c2 of picture 0")
    assert row["p50_ms"] is None
    assert "wrong: c2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--size", "64x96"), "two sizes or more, got 1"), (("--mode", "both"), "no both to measure"),
     (("--size", "64x90"), "multiples of 32")],
    ids=["one-picture", "mode", "size"],
)  # fmt: skip
def test_errors_are_one_message(monkeypatch, tmp_path, capsys, words, message):
    assert bench(monkeypatch, tmp_path / "packed.json", "packed", *words) != 0
    assert message in capsys.readouterr().err


def test_memory_alone_grows_linearly_in_tokens(monkeypatch, tmp_path, capsys):
    """Twice the picture, twice the bytes: nothing of N x N tokens is kept."""
    saved = {}
    for size in ("64x128", "128x128", "128x256"):
        path = tmp_path / f"{size}.json"
        words = ("backbone", "--mode", "train", "--size", size, "--rounds", 0)
        assert bench(monkeypatch, path, *words, "--peers", "ours", "--peers", "original-kept") == 0
        rows = Results.read(path).rows
        assert all(row["status"] == "ok" and row["rounds"] == 0 and row["p50_ms"] is None for row in rows)
        saved[size] = {row["model"]: row["saved_mib"] for row in rows}
        assert "saved MiB" in capsys.readouterr().out
    small, middle, large = saved.values()
    for few, many in ((small, middle), (middle, large)):
        assert many["ours"] == pytest.approx(2 * few["ours"], rel=0.02)
    assert large["original-kept"] > 2.05 * middle["original-kept"]
