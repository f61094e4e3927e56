"""``mimdet bench table1``, ``table7``, ``backbone`` and ``table8`` on a model of one block."""

import itertools

import pytest
import torch
from tiny_model import BOTTOM_UP, CONFIG, OVERRIDES

from mimdet.bench import session, workload
from mimdet.bench.baselines import IMPLEMENTATIONS, with_child
from mimdet.bench.experiments import table8
from mimdet.bench.experiments.backbone import Options, paper, run, with_relative
from mimdet.bench.row import Results


def options(tmp_path, **changes):
    values = {
        "device": "cpu", "output": tmp_path / "figures.json", "size": (64, 64), "rounds": 3, "default": (0.5, 2),
        "config": CONFIG, "overrides": OVERRIDES, "modes": ("train",), "implementations": ("ours", "original"),
    }  # fmt: skip
    return Options(**values | changes)


def test_table1_by_command(experiment):
    words = ("--config", CONFIG, "--size", "64x64", "--rounds", 3, "--impl", "ours", "--impl", "original")
    out, results, text = experiment("table1", *words, "--device", "cpu", *OVERRIDES, suffix=".csv")
    for word in ("backbone, train, 64x64", "inference", "A/A", "train, 0.125, 2", "speed vs original"):
        assert word in out
    assert {(row["mode"], row["ratio"], row["implementation"]) for row in results.rows} == {
        (mode, ratio, name)
        for mode in ("train", "inference")
        for ratio in (0.125, 0.25, 0.5, 0.75, 1.0)
        for name in ("ours", "original")
    }
    for row in results.rows:
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == 3
        assert row["allocated_mib"] > row["peak_mib"] > 0
        assert ("activation_mib" in row) == (row["mode"] == "train")
        if row["ratio"] == 0.5:
            assert row["relative_time"] == row["relative_memory"] == 1
    assert text.count("\n| ") == 2 + len(results.rows)


def test_depths_of_the_detector(tmp_path):
    heads = (
        "model.roi_heads.batch_size_per_image=8",
        "model.proposal_generator.post_nms_topk=[20,20]",
        "model.roi_heads.box_head.fc_dims=[32]",
    )
    chosen = options(tmp_path, config="demo", overrides=(*OVERRIDES, *heads), part="detector", depths=(1,))
    rows = run(chosen).rows
    assert [(row["depth"], row["implementation"]) for row in rows] == [
        (depth, name) for depth in (1, 2) for name in chosen.implementations
    ]
    assert rows[2]["parameters"] > rows[0]["parameters"] == rows[1]["parameters"]
    assert all(row["status"] == "ok" and row["p50_ms"] > 0 for row in rows)


# One set of overrides for all configs; the paper's last needs a block for each of its out_indices.
FOUR = (f"{BOTTOM_UP}.encoder.depth=7", f"{BOTTOM_UP}.encoder.embed_dim=64", f"{BOTTOM_UP}.encoder.num_heads=2")


def test_table8_by_command(experiment):
    words = ("--size", "64x64", "--rounds", 3, "--device", "cpu", "--mode", "train", "--mode", "inference")
    out, results, text = experiment("table8", *words, *FOUR)
    for word in ("backbone, train, 64x64", "inference", "sampled, decoder of 1", "windows, FPN from the ViT", "A/A"):
        assert word in out
    lines = paper()["table8"]
    cases = [*(line["case"] for line in lines), "sampled, decoder of 4, stem_norm=layer"]
    assert [(row["mode"], row["case"]) for row in results.rows] == [
        (mode, case) for mode in ("train", "inference") for case in cases
    ]
    for i, row in enumerate(results.rows):
        assert row["status"] == "ok"
        assert len(row["samples_ms"]) == row["rounds"] == 3
        assert row["allocated_mib"] > 0
        first = results.rows[i // 5 * 5]
        assert row["relative_time"] == pytest.approx(row["p50_ms"] / first["p50_ms"], rel=1e-3)
        if i % 5 < 4:
            assert row["paper_time"] == pytest.approx(lines[i % 5]["hours"] / 20.3, rel=1e-3)
        else:
            assert row["parameters"] == first["parameters"]
            assert "paper_time" not in row
    assert "| train, windows, FPN from the ViT |" in text
    assert "| train, sampled, decoder of 4, stem_norm=layer |" in text
    assert text.count("\n| ") == 2 + 10


def test_a_config_that_differs_is_not_timed(tmp_path, monkeypatch):
    real, calls = workload.outputs_of, itertools.count()

    def other(model, mode, options):
        """Only the first of two calls returns the expected features."""
        outputs, expected = real(model, mode, options), next(calls) % 2 == 0
        return outputs | {"c4": 1.001 * outputs["c4"]} if expected and model.decoder is None else outputs

    monkeypatch.setattr(workload, "outputs_of", other)
    rows = table8.run(
        table8.Options(device="cpu", output=tmp_path / "t.json", size=(64, 64), rounds=3, overrides=FOUR)
    ).rows
    assert [row["status"].partition(":")[0] for row in rows] == ["ok", "ok", "wrong", "wrong", "ok"]
    assert rows[2]["status"].startswith("wrong: c4: relative error 0.001")
    assert not {"p50_ms", "allocated_mib", "relative_time"} & set(rows[2])
    assert rows[1]["relative_time"] > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_baselines_have_the_stems_norm(tmp_path, dtype):
    chosen = options(tmp_path, overrides=(*OVERRIDES, f"{BOTTOM_UP}.encoder.stem_norm=layer"), dtype=dtype)
    assert [row["status"] for row in run(chosen).rows] == ["ok", "ok"]


def test_a_detector_of_one_stage(tmp_path):
    rows = run(options(tmp_path, config="demo_retinanet", part="detector", implementations=("ours",))).rows
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

        def forward(self, images):
            features = self.ours(images)
            return features | {"c4": features["c4"].detach() + 0 * features["c4"]}

    monkeypatch.setitem(IMPLEMENTATIONS, "wrong norm", wrong_norm)
    monkeypatch.setitem(IMPLEMENTATIONS, "no gradient", NoGradient)
    results = run(options(tmp_path, implementations=("ours", "wrong norm", "no gradient")))
    rows = {row["implementation"]: row for row in results.rows}
    assert rows["ours"]["status"] == "ok"
    assert rows["wrong norm"]["status"].startswith("wrong: c4")
    assert rows["no gradient"]["status"].startswith("wrong: gradient of encoder.patch_embed")
    for name in ("wrong norm", "no gradient"):
        assert not {"p50_ms", "allocated_mib", "relative_time"} & set(rows[name])
    assert "wrong: c4" in capsys.readouterr().out


def test_interrupted_run_leaves_its_rounds(tmp_path, monkeypatch):
    real, ticks = session.wall_timer, []

    def stopping(run, calls):
        ticks.append(1)
        if len(ticks) > 2 * 2 * 7 + 3:
            raise KeyboardInterrupt
        return real(run, calls)

    monkeypatch.setattr(session, "wall_timer", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path, rounds=50))
    rounds = {row["rounds"] for row in Results.read(tmp_path / "figures.json").rows}
    assert len(rounds) == 1
    assert 0 < rounds.pop() < 50


def test_papers_columns_are_beside_the_same_rows():
    points = ((0.125, 4), (0.5, 4), (1.0, 4), (0.5, 1), (0.5, 8), (0.5, 3))
    common = {"mode": "train", "implementation": "ours", "p50_ms": 1.0, "allocated_mib": 1.0}
    rows = [{**common, "ratio": ratio, "depth": depth, "activation_mib": ratio} for ratio, depth in points]
    *published, other = with_relative(rows, (0.5, 4))
    expected = [16.0 / 20.3, 1.0, 31.0 / 20.3, 15.5 / 20.3, 27.0 / 20.3]
    assert [row["paper_time"] for row in published] == pytest.approx(expected, rel=1e-3)
    assert published[2]["paper_memory"] == pytest.approx(43.2 / 19.9, rel=1e-3)
    assert [row["relative_activation"] for row in published[:3]] == [0.25, 1.0, 2.0]
    assert "paper_time" not in other
    assert "arXiv 2204.02964" in paper()["source"]


def test_memory_alone_grows_linearly_in_tokens(tmp_path, capsys):
    """Twice the image, twice the bytes: no N x N matrix of tokens is saved."""
    names, saved = ("ours", "original-no-checkpoint"), []
    for size in ((64, 128), (128, 128), (128, 256)):
        rows = run(options(tmp_path, size=size, rounds=0, implementations=names)).rows
        assert all(row["status"] == "ok" and "p50_ms" not in row for row in rows)
        saved.append({row["implementation"]: row["activation_mib"] for row in rows})
    assert "activations MiB" in capsys.readouterr().out
    for few, many in itertools.pairwise(saved):
        assert many["ours"] == pytest.approx(2 * few["ours"], rel=0.02)
    assert saved[2]["original-no-checkpoint"] > 2.05 * saved[1]["original-no-checkpoint"]
