"""``mimdet bench detectron2`` on a small model."""

import pytest

d2 = pytest.importorskip("support.detectron2_testing")

from mimdet.bench.experiments import detectron2
from mimdet.bench.row import Results


def options(tmp_path, **changes):
    chosen = {
        "device": "cpu", "original": d2.folder("MIMDET_ORIGINAL"), "output": tmp_path / "figures.json",
        "size": (64, 64), "rounds": 3, "overrides": tuple(d2.ORIGINAL_SMALL),
    }  # fmt: skip
    return detectron2.Options(**chosen | changes)


def test_times_what_is_equal(tmp_path, capsys):
    detectron2.run(options(tmp_path))
    assert "original-sdpa-no-checkpoint" in capsys.readouterr().out
    rows = Results.read(tmp_path / "figures.json").rows
    assert [row["implementation"] for row in rows] == list(detectron2.IMPLEMENTATIONS)
    assert all(len(row["samples_ms"]) == 3 and row["part"] == "detectron2" for row in rows)


def test_what_differs_is_not_timed(tmp_path, monkeypatch):
    build = detectron2._build

    def other(chosen):
        original, ours = build(chosen)
        ours.bottom_up.decoder.conv_feat_proj.weight.data *= 1.1
        return original, ours

    monkeypatch.setattr(detectron2, "_build", other)
    with pytest.raises(ValueError, match=r"nothing was timed: c4: relative error"):
        detectron2.run(options(tmp_path))
    assert not (tmp_path / "figures.json").exists()


def test_a_folder_without_the_original(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkout of the original MIMDet"):
        detectron2.run(options(tmp_path, original=tmp_path))
