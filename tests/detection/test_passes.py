"""Test-time ensembles over token samples, merged into one result."""

import pytest
import torch
from support.slots import detections_of, sizes_of

from mimdet.config import instantiate
from mimdet.detection import InferencePasses
from mimdet.testing import fixed_noise, tiny_config
from mimdet.testing.small import target


def found(*rows):
    """Detections from (x0, y0, x1, y1, score, label); a mask is its score."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    masks = table[:, 4, None, None].expand(-1, 28, 28)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long(), "mask_probabilities": masks}


def test_the_best_of_what_overlaps_stays_with_the_mean_box_and_mask():
    first = [found((0, 0, 10, 10, 0.9, 0), (20, 20, 30, 30, 0.2, 1)), found()]
    second = [
        found((0, 0, 10, 9, 0.6, 0), (20, 20, 30, 32, 0.6, 1), (0, 0, 10, 10, 0.5, 1), (0, 0, 10, 1, 0.1, 0)),
        found((1, 1, 2, 2, 0.3, 0), (5, 5, 5, 5, 0.0, 0)),
    ]
    passes = InferencePasses(passes=2, ratio=0.5)
    merged = passes.merge([detections_of(first), detections_of(second)], 2).tolist()
    assert merged[0]["scores"].tolist() == pytest.approx([0.9, 0.6, 0.5, 0.1])
    assert merged[0]["labels"].tolist() == [0, 1, 1, 0]
    expected = [[0, 0, 10, (0.9 * 10 + 0.6 * 9) / 1.5], [20, 20, 30, (0.2 * 30 + 0.6 * 32) / 0.8], [0, 0, 10, 10]]
    assert merged[0]["boxes"][:3].tolist() == [pytest.approx(box) for box in expected]
    masks = merged[0]["mask_probabilities"][:, 3, 5].tolist()
    assert masks == pytest.approx([(0.9**2 + 0.6**2) / 1.5, (0.2**2 + 0.6**2) / 0.8, 0.5, 0.1])
    assert merged[1]["boxes"].tolist() == [[1, 1, 2, 2], [5, 5, 5, 5]]
    two = InferencePasses(passes=2, ratio=0.5, topk=2).merge([detections_of(first), detections_of(second)], 2)
    assert two.valid.tolist() == [[True, True], [True, True]]
    assert passes.merge([detections_of([found()])] * 2, 2).valid.sum() == 0


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model = instantiate(tiny_config("mimdet_b_mask_rcnn").model).eval()
    model.roi_heads.box_predictor.test_score_thresh = 0.0
    return model


def run(model, passes, images, tokens=None):
    before, model.passes = model.passes, passes
    try:
        with torch.no_grad(), fixed_noise(model, tokens):
            return model(images)
    finally:
        model.passes = before


def test_passes_are_independent_runs_of_the_detector(detector):
    images = [torch.rand(3, 64, 96) * 255, torch.rand(3, 50, 60) * 255]
    noise = torch.rand(3, 2, 24)
    passes = InferencePasses(passes=3, ratio=0.5)
    actual = run(detector, passes, images, noise)
    batch = detector.preprocess(images)
    with torch.no_grad(), fixed_noise(detector, noise):
        sizes = sizes_of(batch.image_sizes)
        each = [detector.detect(detector.backbone(batch, sample_ratio=0.5), sizes) for _ in noise]
    expected = passes.merge(each, 80).tolist()
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours["scores"], theirs["scores"])
        assert ours["masks"].shape[0] == len(ours["scores"]) > 10
    alone = run(detector, InferencePasses(ratio=0.5), images, noise[0])
    assert alone[0]["scores"].tolist() == pytest.approx(each[0].tolist()[0]["scores"].tolist())
    assert alone[0]["scores"].tolist() != pytest.approx(actual[0]["scores"].tolist())


def test_each_pass_draws_its_own_tokens(detector):
    tokens = []
    hook = detector.backbone.bottom_up.encoder.register_forward_hook(
        lambda m, a, out: tokens.append(out.split.ids_keep)
    )
    run(detector, InferencePasses(passes=2, ratio=0.5), [torch.full((3, 64, 96), 100.0)])
    hook.remove()
    assert len(tokens) == 2
    assert not torch.equal(*tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": 0}, "passes must be at least 1, got 0"),
        ({"ratio": 1.5}, r"ratio must be in \(0, 1\], got 1.5"),
        ({"passes": 2}, "passes=2 need an inference.ratio below 1"),
        ({"passes": 2, "ratio": 1.0}, "passes=2 need an inference.ratio below 1"),
    ],
)
def test_bad_words(changes, message):
    with pytest.raises(ValueError, match=message):
        InferencePasses(**changes)


def test_fixed_noise_names_what_the_model_does_not_choose(detector):
    message = "MIMDetBackbone draws no numbers for anchors or proposals"
    with pytest.raises(ValueError, match=message), fixed_noise(detector.backbone.bottom_up, None, *torch.rand(2, 1, 9)):
        pass


def test_fixed_noise_of_another_shape_is_refused_and_forgotten(detector):
    with pytest.raises(ValueError, match=r"noise of tokens must be \(1, 24\), got \(1, 23\)"):
        run(detector, InferencePasses(ratio=0.5), [torch.zeros(3, 64, 96)], torch.rand(1, 23))
    run(detector, InferencePasses(ratio=0.5), [torch.zeros(3, 64, 96)])


def test_fixed_noise_makes_training_repeat():
    """Also with more ground-truth slots than boxes; without drop path, which draws its own numbers."""
    detector = instantiate(tiny_config("mimdet_b_mask_rcnn", "model.backbone.bottom_up.encoder.dpr=0.0").model)
    images = [torch.rand(3, 64, 96) * 255, torch.rand(3, 50, 60) * 255]
    targets = [target(5, (64, 96), 2), target(6, (50, 60), 1)]
    anchors = 3 * (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2)
    numbers = torch.rand(2, 24), torch.rand(2, anchors), torch.rand(2, 40 + 5)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with fixed_noise(detector.train(), *numbers):
            runs.append(detector(images, targets))
    assert {k: v.item() for k, v in runs[0].items()} == {k: v.item() for k, v in runs[1].items()}
    with pytest.raises(ValueError, match="40 proposals"), fixed_noise(detector.train(), None, None, torch.rand(2, 41)):
        detector(images, targets)
