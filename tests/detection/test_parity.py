"""The whole detector against recordings of the original MIMDet on Detectron2.

The recordings (``recordings/original_small.*``) are of the small model of ``small_mimdet.py`` with the weights of
``fill_weights.py``, images ``image(11, 224, 320)`` and ``image(12, 150, 300)``, ground truth
``polygons(21, ...)`` and ``polygons(22, ...)``, token noise ``noise(7, ...)``. Wherever candidates are drawn at
random, the first ones in index order were taken.
"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.fill_weights import gradient, noise
from support.golden import Golden, take
from support.small_mimdet import SIZES, make_images, normalized, small_model, target

from mimdet.kernels import use
from mimdet.modeling import ImageList
from mimdet.testing import fixed_noise

GOLDEN = Golden("original_small")
COUNTS = (3, 5)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def fresh():
    return small_model()


def recorded_noise(model):
    """The recordings' tokens; anchors and proposals are chosen in the order of their index."""
    anchors = 3 * sum(
        math.ceil(SIZES[0][0] / stride) * math.ceil(SIZES[0][1] / stride) for stride in (4, 8, 16, 32, 64)
    )
    proposals = model.proposal_generator.post_nms_topk[0] + max(COUNTS)
    in_order = [(torch.arange(count) / count).expand(2, -1) for count in (anchors, proposals)]
    return fixed_noise(model, torch.from_numpy(noise(7, 2, 280)), *in_order)


def targets():
    return [target(21 + i, size, count) for i, (size, count) in enumerate(zip(SIZES, COUNTS, strict=True))]


def bitmaps(polygons, size):
    from pycocotools import mask as coco

    rows = [coco.decode(coco.merge(coco.frPyObjects([q.tolist() for q in p], *size))) for p in polygons]
    return torch.from_numpy(np.stack(rows)).bool()


def backbone_input():
    return ImageList.from_tensors(normalized(make_images(seed=11)), 32)


def relative(key, actual):
    return GOLDEN.error(key, actual.detach().numpy())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 1.0])
def test_features(model, ratio):
    with torch.no_grad(), recorded_noise(model):
        features = model.eval().backbone.bottom_up(backbone_input(), sample_ratio=ratio)
    prefix = "stable_" if ratio == 0.75 else ""  # ties among padding tokens matter there
    for name, feature in features.items():
        assert relative(f"{prefix}r{ratio}_{name}", feature) <= 3e-6, name


def gradients(model, dtype, names=("c2", "c3", "c4", "c5")):
    bottom_up, images = model.backbone.bottom_up, backbone_input()
    bottom_up.to(dtype).zero_grad()
    # Compiled kernels have no float64: it always runs in plain PyTorch.
    with use("auto") if dtype is torch.float64 else nullcontext(), recorded_noise(model):
        features = bottom_up(ImageList(images.tensor.to(dtype), images.image_sizes), sample_ratio=0.5)
    upstream = {n: torch.from_numpy(gradient(100 + i, f.shape)).to(dtype) for i, (n, f) in enumerate(features.items())}
    sum((features[n] * upstream[n]).sum() for n in names).backward()
    return {n: p.grad.double() for n, p in bottom_up.named_parameters() if p.requires_grad}


def test_backbone_gradients(fresh):
    """In float64: in float32 rounding may choose the other of two nearly equal cells in c5's max pooling."""
    for name, grad in gradients(fresh.eval(), torch.float64).items():
        assert relative(f"grad.{name}", grad) <= 2e-5, name


def test_backbone_gradients_in_float32(fresh):
    smooth = "c2", "c3", "c4"
    actual, expected = (gradients(fresh.eval(), dtype, smooth) for dtype in (torch.float32, torch.float64))
    assert len(actual) > 60
    for name in actual:
        assert (actual[name] - expected[name]).norm() <= 2e-5 * expected[name].norm(), name


@pytest.mark.parametrize("case", ["polygons", "bitmasks", "one_empty", "two_parts", "all_empty"])
def test_training(fresh, case):
    truth = targets()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": []}
    if case == "bitmasks":
        truth = [{**t, "masks": bitmaps(t["masks"], s)} for t, s in zip(truth, SIZES, strict=True)]
    elif case == "one_empty":
        truth[1] = empty
    elif case == "all_empty":
        truth = [empty, empty]
    elif case == "two_parts":
        first, second, third = (truth[0]["masks"][i] for i in range(3))
        box = torch.cat([truth[0]["boxes"][:2, :2].amin(0), truth[0]["boxes"][:2, 2:].amax(0)])
        truth[0] = {
            "boxes": torch.stack([box, truth[0]["boxes"][2]]),
            "labels": truth[0]["labels"][[0, 2]],
            "masks": [[*first, *second], third],
        }
    with recorded_noise(fresh):
        losses = fresh.train()(make_images(seed=11), truth)
    for name, loss in losses.items():
        expected = GOLDEN.expected(f"train_{case}.{name}").item()
        assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-9), name
    sum(losses.values()).backward()
    compared = 0
    for key in GOLDEN.meta:
        if key.startswith(f"train_{case}.grad."):
            gradient_ = fresh.get_parameter(key.split(".grad.")[1]).grad
            expected = GOLDEN.expected(key)
            actual = take(gradient_.numpy(), GOLDEN.meta[key]["index"])
            # A ReLU whose input is near 0 may switch by rounding, hence not tighter.
            assert np.linalg.norm(actual - expected) <= 2e-2 * np.linalg.norm(expected) + 1e-6, key
            compared += 1
        elif key.startswith(f"train_{case}.bn."):
            # PyTorch's channels_last batch norm sums naively on a CPU, worst on a single thread.
            assert relative(key, fresh.get_buffer(key.split(".bn.")[1])) <= 5e-5, key
            compared += 1
    assert compared > 40


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_inference(model, ratio):
    model.eval()
    model.backbone.bottom_up.inference_sample_ratio = ratio
    seen = {}
    hooks = [
        model.backbone.register_forward_hook(lambda m, a, out: seen.update(fpn=out)),
        model.proposal_generator.rpn_head.register_forward_hook(lambda m, a, out: seen.update(rpn=out)),
        model.proposal_generator.register_forward_hook(lambda m, a, out: seen.update(proposals=out[0])),
        model.roi_heads.register_forward_hook(lambda m, a, out: seen.update(detections=out[0])),
    ]
    images = make_images(seed=11)
    with torch.no_grad(), recorded_noise(model):
        results = model(images)
    for hook in hooks:
        hook.remove()
    case = f"eval_r{ratio}"
    if ratio == 0.5:
        for name, level in seen["fpn"].items():
            assert relative(f"{case}.{name}", level) <= 1e-5
        for i, (logits, deltas) in enumerate(zip(*seen["rpn"], strict=True)):
            height, width = seen["fpn"][f"p{i + 2}"].shape[-2:]
            logits = logits.unflatten(1, (height, width, 3)).permute(0, 3, 1, 2)
            deltas = deltas.unflatten(1, (height, width, 3)).permute(0, 3, 4, 1, 2).flatten(1, 2)
            assert relative(f"{case}.rpn_logits{i}", logits) <= 1e-5
            assert relative(f"{case}.rpn_deltas{i}", deltas) <= 1e-5
    for i, (boxes, valid, detection, result) in enumerate(
        zip(*seen["proposals"], seen["detections"].tolist(), results, strict=True)
    ):
        key = f"{case}.im{i}"
        stored = GOLDEN.expected(f"{key}.proposal_boxes")
        gap = np.abs(take(boxes[valid].numpy(), GOLDEN.meta[f"{key}.proposal_boxes"]["index"]) - stored).max(axis=1)
        assert (gap <= 5e-3).mean() >= 0.99
        order = _same_order(detection["boxes"].numpy(), GOLDEN.expected(f"{key}.boxes"), 5e-3)
        np.testing.assert_array_equal(detection["labels"][order], GOLDEN.expected(f"{key}.labels"))
        np.testing.assert_allclose(detection["scores"][order], GOLDEN.expected(f"{key}.scores"), atol=1e-4)
        index = GOLDEN.meta[f"{key}.mask_probs"]["index"]
        probabilities = take(detection["mask_probabilities"][order].numpy(), index)
        np.testing.assert_allclose(probabilities, GOLDEN.expected(f"{key}.mask_probs"), atol=1e-3)
        _check_masks(f"{key}.own", result, order)


@pytest.mark.parametrize(("image", "size"), [(1, (300, 600)), (0, (337, 480))])
def test_results_at_another_size(model, image, size):
    model.eval()
    model.backbone.bottom_up.inference_sample_ratio = 0.5
    sizes = list(SIZES)
    sizes[image] = size
    with torch.no_grad(), recorded_noise(model):
        result = model(make_images(seed=11), output_sizes=sizes)[image]
    key = f"eval_r0.5.im{image}.to{size[0]}x{size[1]}"
    _check_masks(key, result, _same_order(result["boxes"].numpy(), GOLDEN.expected(f"{key}.boxes"), 1e-2))
    assert result["masks"].shape[1:] == size


def _same_order(actual, expected, tolerance):
    """Index in ``actual`` of each expected box; all must be there, and nearly all in place."""
    gaps = np.abs(actual[None] - expected[:, None]).max(axis=2)
    order = gaps.argmin(axis=1)
    assert actual.shape == expected.shape
    assert gaps.min(axis=1).max() <= tolerance
    assert sorted(order) == list(range(len(actual)))
    # Two scores that differ by rounding alone may change places.
    assert (order == np.arange(len(actual))).mean() >= 0.95
    return order


def _check_masks(key, result, order):
    index = GOLDEN.meta[f"{key}.boxes"]["index"]
    masks = result["masks"][order]
    np.testing.assert_allclose(take(result["boxes"][order].numpy(), index), GOLDEN.expected(f"{key}.boxes"), atol=1e-2)
    assert np.abs(masks.sum((1, 2)).numpy() - GOLDEN.expected(f"{key}.pixels")).max() <= 10
    if f"{key}.bits" in GOLDEN.meta:
        expected = np.unpackbits(GOLDEN.expected(f"{key}.bits"), axis=1)
        actual = masks[: len(expected)].flatten(1).numpy()
        assert (actual != expected[:, : actual.shape[1]]).sum(axis=1).max() <= 10
