"""The configs of the paper's ablations, what each changes, and the sizes of all shipped detectors."""

import math

import pytest
import torch
from support.paths import CONFIGS

from mimdet.config import instantiate, load, to_yaml

ABLATIONS = sorted(p.stem for p in (CONFIGS / "ablations").glob("*.py"))
BOTTOM_UP = "model.backbone.bottom_up"
CONV_FILL = f"{BOTTOM_UP}.decoder.fill=conv_stem"


@pytest.mark.parametrize(
    ("name", "overrides", "exact", "papers_millions"),
    [
        ("mimdet_b_mask_rcnn", [], 127_954_768, 127),
        ("mimdet_l_mask_rcnn", [], 349_332_080, 349),
        ("ablations/stem_layer_norm", [], 127_954_768, 127),
        ("mimdet_b_cascade_mask_rcnn", [], 158_219_966, None),
        ("mimdet_l_cascade_mask_rcnn", [], 379_597_278, None),
        ("mimdet_b_retinanet", [], 116_101_204, None),
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
    with torch.device("meta"):
        model = instantiate(load(f"configs/{name}.py", overrides).model)
    count = sum(p.numel() for p in model.parameters())
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
