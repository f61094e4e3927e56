"""``mimdet bench packed`` on a model of one block."""

from functools import partial

import pytest
from tiny_model import CONFIG, OVERRIDES

from mimdet.bench.experiments.packed import LAYOUTS
from mimdet.modeling import MIMDetBackbone


@pytest.fixture
def measure(experiment):
    """The experiment on three images."""
    sizes = ("--size", "64x96", "--size", "96x64", "--size", "32x64")
    return partial(experiment, "packed", *sizes, "--rounds", 3, "--config", CONFIG, "--device", "cpu", *OVERRIDES)


def test_by_command(measure):
    out, results, text = measure()
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
    assert "64x96 96x64 32x64, train, 0.5 | packed" in text


def test_a_wrong_result_is_not_timed(measure, monkeypatch):
    forward = MIMDetBackbone.forward

    def wrong(self, *args, **kwargs):
        features = forward(self, *args, **kwargs)
        return {k: v + 0.01 for k, v in features.items()} if self.batch_mode == "packed" else features

    monkeypatch.setattr(MIMDetBackbone, "forward", wrong)
    out, results, _ = measure("--mode", "inference")
    row = results.rows[1]
    assert row["implementation"] == "packed"
    assert row["status"].startswith("wrong: c2 of image 0")
    assert "p50_ms" not in row
    assert "wrong: c2" in out
