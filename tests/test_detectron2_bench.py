"""``mimdet bench detectron2`` on a small model."""

import pytest

d2 = pytest.importorskip("detectron2_testing")

from mimdet.bench import detectron2 as bench
from mimdet.bench.results import Results


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(bench, "measure_limits", lambda device, dtypes: {"copy_gb_s": 10.0})


def options(tmp_path, **changes):
    given = {
        "device": "cpu", "original": d2.folder("MIMDET_ORIGINAL"), "output": tmp_path / "figures.json",
        "size": (64, 64), "rounds": 3, "overrides": tuple(d2.ORIGINAL_SMALL),
    }  # fmt: skip
    return bench.Options(**given | changes)


def test_times_what_is_equal(tmp_path, capsys):
    bench.run_detectron2(options(tmp_path))
    assert "original-sdpa-kept" in capsys.readouterr().out
    rows = Results.read(tmp_path / "figures.json").rows
    assert [row["model"] for row in rows] == list(bench.PEERS)
    for row in rows:
        assert len(row["samples_ms"]) == 3
        assert (row["vs_original_sdpa"] is None) == (row["model"] == "original-sdpa")


def test_what_differs_is_not_timed(tmp_path, monkeypatch):
    build = bench._build

    def other(given):
        original, ours = build(given)
        ours.bottom_up.decoder.conv_feat_proj.weight.data *= 1.1
        return original, ours

    monkeypatch.setattr(bench, "_build", other)
    with pytest.raises(ValueError, match=r"c4 is .* off the original's"):
        bench.run_detectron2(options(tmp_path))
    assert not (tmp_path / "figures.json").exists()


def test_a_folder_without_the_original(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a checkout of the original MIMDet"):
        bench.run_detectron2(options(tmp_path, original=tmp_path))
