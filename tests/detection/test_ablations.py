"""The configs of the paper's ablations: their sizes, what each changes, and a small counterpart of each."""

import json
import math

import pytest
import torch
from support.paths import CONFIGS
from test_detectors import counterpart_on_shapes

from mimdet.config import instantiate, load, to_yaml
from mimdet.data.synthetic import generate_shapes
from mimdet.engine import evaluate_only, train

ABLATIONS = sorted(p.stem for p in (CONFIGS / "ablations").glob("*.py"))
BOTTOM_UP = "model.backbone.bottom_up"
CONV_FILL = f"{BOTTOM_UP}.decoder.fill=conv_stem"


def parameters(name, *overrides):
    with torch.device("meta"):
        model = instantiate(load(f"configs/{name}.py", overrides).model)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "overrides", "exact", "papers_millions"),
    [
        ("mimdet_b_mask_rcnn", [], 127_954_768, 127),
        ("mimdet_l_mask_rcnn", [], 349_332_080, 349),
        ("ablations/stem_layer_norm", [], 127_954_768, 127),
        ("ablations/table5_convnext", [], 129_492_400, None),
        ("ablations/table6_mask_token", [], 127_561_552, 127),
        ("ablations/table7_decoder_1", [CONV_FILL], 118_497_616, 118),
        ("ablations/table7_decoder_1", [], 118_104_400, 118),
        ("ablations/table7_decoder_2", [CONV_FILL], 121_650_000, 121),
        ("ablations/table7_decoder_2", [], 121_256_784, 121),
        ("ablations/table7_decoder_8", [CONV_FILL], 140_564_304, 140),
        ("ablations/table7_decoder_8", [], 140_171_088, 140),
        ("ablations/table8_window", [], 113_407_312, 113),
        ("ablations/table8_window_vit_fpn", [], 120_734_800, 120),
    ],
)
def test_number_of_parameters(name, overrides, exact, papers_millions):
    count = parameters(name, *overrides)
    assert count == exact
    # The paper cuts millions: its 127 is 127.95.
    assert papers_millions in (None, math.floor(count / 1e6))


def test_second_stage_is_a_sixth_of_the_first():
    first, second = (load(f"configs/ablations/{name}.py") for name in ("table6_mask_token", "table2_full_set"))
    assert second.train.max_iter == first.train.max_iter / 6
    assert second.train.init_checkpoint == f"{first.train.output_dir}/model_final.pth"
    assert to_yaml(second.optimizer) == to_yaml(first.optimizer)
    schedules = [instantiate(cfg.lr_multiplier) for cfg in (first, second)]
    for progress in (0.05, 0.5, 0.76, 0.95):
        assert schedules[0](progress) == schedules[1](progress)


def test_every_ablation_is_named_by_its_table_and_writes_to_its_own_folder():
    for name in ABLATIONS:
        cfg = load(f"configs/ablations/{name}.py")
        assert name.startswith(("table", "stem"))
        assert cfg.train.output_dir == f"output/ablations/{name}"
        decoder = cfg.model.backbone.bottom_up.decoder
        assert decoder is None or decoder.get("fill", "conv_stem") == (
            "conv_stem" if name.startswith("stem") else "mask_token"
        )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return generate_shapes(tmp_path_factory.mktemp("data") / "shapes", 4, 2, (64, 96))


@pytest.mark.parametrize("name", ["mimdet_b_mask_rcnn", *(f"ablations/{name}" for name in ABLATIONS)])
def test_counterpart_trains_saves_loads_and_evaluates(name, shapes, tmp_path):
    cfg = counterpart_on_shapes(name, shapes, tmp_path / "run")
    cfg.train.init_checkpoint = ""
    trained = train(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["total_loss"] for line in lines if "total_loss" in line]
    assert len(losses) == 2
    assert all(loss is not None and math.isfinite(loss) for loss in losses)
    again = load(tmp_path / "run" / "config.yaml", [f"train.init_checkpoint={tmp_path}/run/model_final.pth"])
    scored = evaluate_only(again)
    assert scored.keys() == trained.keys() >= {"bbox", "segm"}
    if cfg.model.inference.ratio is None:  # else each evaluation draws its own samples
        assert str(scored) == str(trained)
