"""``mimdet bench table1`` and its kin on a model of one block."""

import pytest
import torch
from test_cli import run

from mimdet.bench import backbone, forms
from mimdet.bench.backbone import Options, paper, run_tables
from mimdet.bench.models import PEERS, with_child
from mimdet.bench.plot import plot
from mimdet.bench.readme import render
from mimdet.bench.results import Results
from mimdet.testing import tiny_overrides

LIMITS = {"copy_gb_s": 10.0, "gemm_float32_tflop_s": 0.1}
BOTTOM_UP = "model.backbone.bottom_up"
OVERRIDES = (
    f"{BOTTOM_UP}.encoder.depth=1",
    f"{BOTTOM_UP}.encoder.embed_dim=64",
    f"{BOTTOM_UP}.encoder.num_heads=2",
    f"{BOTTOM_UP}.decoder.decoder_embed_dim=32",
    f"{BOTTOM_UP}._out_feature_channels=[16,32,32,32]",
)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    for module in (backbone, forms):
        monkeypatch.setattr(module, "measure_limits", lambda device, dtypes: LIMITS)


def options(tmp_path, **changes):
    given = {
        "device": "cpu", "output": tmp_path / "figures.json", "size": (64, 64), "rounds": 3, "default": (0.5, 2),
        "config": "mimdet_tiny_mask_rcnn", "overrides": OVERRIDES, "peers": ("ours", "original"),
    }  # fmt: skip
    return Options(**given | changes)


def test_table1_by_command(monkeypatch, tmp_path, capsys):
    path = tmp_path / "table1.csv"
    status = run(
        monkeypatch, "bench", "table1", "--config", "mimdet_tiny_mask_rcnn", "--size", "64x64", "--rounds", 3,
        "--device", "cpu", "--peers", "ours", "--peers", "original", "--output", path, *OVERRIDES,
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    for word in ("backbone, train, 64x64", "inference", "A/A", "0.125, 2, ours", "1, 2, original", "speed vs original"):
        assert word in out
    rows = Results.read(path).rows
    assert {(row["mode"], row["ratio"], row["model"]) for row in rows} == {
        (mode, ratio, model)
        for mode in ("train", "inference")
        for ratio in (0.125, 0.25, 0.5, 0.75, 1.0)
        for model in ("ours", "original")
    }
    for row in rows:
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == 3
        assert row["allocated_mib"] > 0
        assert (row["saved_mib"] is not None) == (row["mode"] == "train")
        assert (row["vs_original"] is not None) == (row["model"] == "ours")
        if row["ratio"] == 0.5:
            assert row["relative_time"] == row["relative_memory"] == 1


def test_depths_of_the_detector(tmp_path):
    heads = (
        "model.roi_heads.batch_size_per_image=8",
        "model.proposal_generator.post_nms_topk=[20,20]",
        "model.roi_heads.box_head.fc_dims=[32]",
    )
    chosen = options(tmp_path, config="demo", overrides=(*OVERRIDES, *heads), part="detector", depths=(1,))
    found = run_tables(chosen)
    assert [(row["depth"], row["model"]) for row in found.rows] == [(d, m) for d in (1, 2) for m in chosen.peers]
    assert found.rows[2]["parameters"] > found.rows[0]["parameters"] == found.rows[1]["parameters"]
    assert all(row["status"] == "ok" and row["p50_ms"] > 0 for row in found.rows)


# All four forms with one set of overrides: blocks for the taps of the last.
FORMS = (f"{BOTTOM_UP}.encoder.depth=7", f"{BOTTOM_UP}.encoder.embed_dim=64", f"{BOTTOM_UP}.encoder.num_heads=2")


def test_table8_by_command(monkeypatch, tmp_path, capsys):
    path = tmp_path / "table8.json"
    status = run(
        monkeypatch, "bench", "table8", "--size", "64x64", "--rounds", 3, "--device", "cpu", "--mode", "train",
        "--mode", "inference", "--output", path, *FORMS,
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out
    for word in ("backbone, train, 64x64", "inference", "sampled, decoder of 1", "windows, FPN from the ViT", "A/A"):
        assert word in out
    rows = Results.read(path).rows
    lines = paper()["table8"]
    assert [(row["mode"], row["form"]) for row in rows] == [
        (mode, line["form"]) for mode in ("train", "inference") for line in lines
    ]
    for row, line in zip(rows, 2 * lines, strict=True):
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == row["rounds"] == 3
        assert row["allocated_mib"] > 0
        assert row["paper_time"] == pytest.approx(line["hours"] / 20.3, rel=1e-3)
        assert row["relative_time"] == pytest.approx(
            row["p50_ms"] / rows[row["mode"] == "inference" and 4]["p50_ms"], rel=1e-3
        )
    plot(Results.read(path), tmp_path / "table8.png")
    assert (tmp_path / "table8.png").read_bytes().startswith(b"\x89PNG")
    text = render(Results.read(path))
    assert "| train, windows, FPN from the ViT |" in text
    assert text.count("\n| ") == 2 + 8


def test_a_form_that_differs_is_not_timed(tmp_path, monkeypatch):
    real = forms.outcome

    def other(model, mode, options):
        found = real(model, mode, options)
        return found if model.decoder is not None else found | {"c4": 1.001 * found["c4"]}

    monkeypatch.setattr(forms, "outcome", other)
    chosen = forms.Options(device="cpu", output=tmp_path / "t.json", size=(64, 64), rounds=3, overrides=FORMS)
    found = forms.run_forms(chosen).rows
    assert [row["status"].split(" is ")[0] for row in found] == ["ok", "ok", "wrong: c4", "wrong: c4"]
    assert found[2]["p50_ms"] is found[2]["allocated_mib"] is None
    assert found[1]["relative_time"] > 0


def test_a_detector_of_one_stage(tmp_path):
    small = tiny_overrides("mimdet_b_retinanet")
    chosen = options(
        tmp_path, config="mimdet_b_retinanet", overrides=small, part="detector", default=(0.5, 1), peers=("ours",)
    )
    rows = run_tables(chosen).rows
    assert rows
    assert all(row["status"] == "ok" and row["p50_ms"] > 0 for row in rows)


def test_a_model_that_differs_is_not_timed(tmp_path, monkeypatch, capsys):
    def wrong_norm(ours):
        norm = torch.nn.LayerNorm(64, eps=1e-3)
        norm.load_state_dict(ours.encoder.norm.state_dict())
        return with_child(ours, "encoder.norm", norm)

    class NoGradient(torch.nn.Module):
        def __init__(self, ours):
            super().__init__()
            self.ours = ours
            self.encoder, self.decoder = ours.encoder, ours.decoder

        def forward(self, images, noise=None):
            features = self.ours(images, noise=noise)
            return features | {"c4": features["c4"].detach() + 0 * features["c4"]}

    monkeypatch.setitem(PEERS, "wrong norm", ("", wrong_norm))
    monkeypatch.setitem(PEERS, "no gradient", ("", NoGradient))
    found = run_tables(options(tmp_path, peers=("ours", "wrong norm", "no gradient")))
    rows = {row["model"]: row for row in found.rows}
    assert rows["ours"]["status"] == "ok"
    assert rows["wrong norm"]["status"].startswith("wrong: c4")
    assert rows["no gradient"]["status"].startswith("wrong: gradient of encoder.patch_embed")
    for name in ("wrong norm", "no gradient"):
        assert rows[name]["p50_ms"] is rows[name]["allocated_mib"] is rows[name]["relative_time"] is None
    assert "wrong: c4" in capsys.readouterr().out


def test_interrupted_run_leaves_its_rounds(tmp_path, monkeypatch):
    real, ticks = backbone.wall_timer, []

    def stopping(run, calls):
        ticks.append(1)
        if len(ticks) > 2 * 2 * 7 + 3:
            raise KeyboardInterrupt
        return real(run, calls)

    monkeypatch.setattr(backbone, "wall_timer", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_tables(options(tmp_path, rounds=50))
    rounds = {row["rounds"] for row in Results.read(tmp_path / "figures.json").rows}
    assert len(rounds) == 1
    assert 0 < rounds.pop() < 50


def test_papers_columns_stand_beside_the_same_rows():
    rows = [
        {"mode": "train", "ratio": ratio, "depth": depth, "model": "ours", "p50_ms": 1.0, "allocated_mib": 1.0,
         "saved_mib": ratio, "paper_time": None, "paper_memory": None}
        for ratio, depth in ((0.125, 4), (0.5, 4), (1.0, 4), (0.5, 1), (0.5, 8), (0.5, 3))
    ]  # fmt: skip
    made = backbone._relate(rows, Options(device="cpu", output="x"))
    want = [16.0 / 20.3, 1.0, 31.0 / 20.3, 15.5 / 20.3, 27.0 / 20.3]
    assert [row["paper_time"] for row in made[:5]] == pytest.approx(want, rel=1e-3)
    assert made[2]["paper_memory"] == pytest.approx(43.2 / 19.9, rel=1e-3)
    assert [row["relative_saved"] for row in made[:3]] == [0.25, 1.0, 2.0]
    assert made[5]["paper_time"] is None
    assert "arXiv 2204.02964" in paper()["source"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["table1", "--peers", "theirs"], "no theirs to measure; choose from ours"),
        (["table7", "--part", "wheel"], "no wheel to measure; choose from backbone, detector"),
        (["backbone", "--ratio", "1.5"], r"a keep ratio is in \(0, 1\], got 1.5"),
        (["backbone", "--dtype", "int4"], "no dtype 'int4'"),
        (["table8", "--part", "wheel"], "no wheel to measure; choose from backbone, detector"),
        (["table7", "--config", "ablations/table8_window"], "has no decoder to vary; mimdet bench table8 measures it"),
        (["backbone", "--config", "nothing"], "no config file 'nothing'"),
    ],
    ids=["peer", "part", "ratio", "dtype", "form", "no decoder", "config"],
)
def test_errors_are_one_message(monkeypatch, capsys, argv, message):
    assert run(monkeypatch, "bench", *argv, "--device", "cpu") == 1
    assert message.replace("\\", "") in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ops", "table1", "table7", "table8", "backbone"])
def test_help_teaches(monkeypatch, capsys, command):
    assert run(monkeypatch, "bench", command, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) > 10
