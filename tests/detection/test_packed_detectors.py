"""Packed batches through whole detectors: an image's results depend neither on its batch nor on the processes."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.fill_weights import fill_module
from support.slots import truth_of
from support.tiny_detectors import DETECTORS, detector, targets_of
from torch import nn

from mimdet.config import load
from mimdet.data.synthetic import generate_shapes
from mimdet.detection import FPN, LastLevelP6P7, Matcher, ROIPooler
from mimdet.detection.assignment import outside_images
from mimdet.detection.layers import get_norm, normalize
from mimdet.engine.evaluate import Evaluation
from mimdet.modeling.areas import PackedFeatures, ValidAreas
from mimdet.testing.small import make_images

# A multiple of 32, odd sides, one pixel, the whole width of the canvas, one smaller than p5's cells.
SIZES = [(96, 128), (75, 141), (1, 1), (40, 160), (20, 30)]
AREAS = ValidAreas([(20, 28), (9, 40), (32, 1)], (32, 64), torch.device("cpu"))


def packed(name, *options):
    return detector(name, "model.backbone.bottom_up.batch_mode=packed", *options)


def with_garbage(model, value):
    """Sets the pixels of the padding to ``value``."""
    preprocess = model.preprocess

    def patched(images):
        batch = preprocess(images)
        for image, (height, width) in zip(batch.tensor, batch.image_sizes, strict=True):
            image[:, height:], image[:, :, width:] = value, value
        return batch

    model.preprocess = patched
    return model


def assert_same(actual, expected):
    """The same detections to rounding; equal scores may change places."""
    assert len(actual["scores"]) == len(expected["scores"]) > 0
    columns = [
        torch.cat([d["boxes"], 100 * d["scores"][:, None], 100.0 * d["labels"][:, None]], 1) for d in (actual, expected)
    ]
    distance, order = torch.cdist(*columns, p=torch.inf).min(dim=1)
    assert float(distance.max()) <= 2e-3, "pixels, or hundredths of score"
    assert order.sort().values.equal(torch.arange(len(order)))
    if "masks" in expected:
        assert (actual["masks"] != expected["masks"][order]).float().mean() <= 1e-3


@pytest.mark.parametrize("name", [*DETECTORS, "group_norm"])
def test_detections_are_those_of_the_image_alone(name):
    """For any batch, order, and content of the padding."""
    options = ["model.backbone.norm=GN", "model.head.norm=GN"] if name == "group_norm" else []
    model = packed("retinanet" if options else name, *options).eval()
    # GroupNorm over the two channels of a single cell magnifies rounding: tiny images do without it.
    images = make_images([(96, 128), (75, 141), (70, 160)] if options else SIZES)
    with torch.no_grad():
        alone = [model([image])[0] for image in images]
        together = model(images)
        garbage = with_garbage(model, float("nan"))(images[::-1])[::-1]
        large = with_garbage(model, 1e30)(images[1:3])
    for results in (together, garbage):
        for actual, expected in zip(results, alone, strict=True):
            assert_same(actual, expected)
    for actual, expected in zip(large, alone[1:3], strict=True):
        assert_same(actual, expected)


def test_a_pixel_beside_a_wide_image():
    model = packed("mask_rcnn").eval()
    images = make_images([(1, 1), (100, 400)])
    with torch.no_grad():
        for actual, image in zip(model(images), images, strict=True):
            assert_same(actual, model([image])[0])


@pytest.mark.parametrize("name", DETECTORS)
def test_without_padding_the_same_as_on_the_canvas(name):
    images = make_images([(96, 128), (96, 128)])
    with torch.no_grad():
        for actual, expected in zip(packed(name).eval()(images), detector(name).eval()(images), strict=True):
            assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("norm", ["SyncBN", "BN", "GN", ""])
@pytest.mark.parametrize("name", ["mask_rcnn", "retinanet"])
def test_padding_of_every_level_is_zero(name, norm):
    model = packed(name, f"model.backbone.norm={norm!r}").train()
    batch = model.preprocess(make_images(SIZES))
    for level, maps in model.backbone(batch).items():
        area = ValidAreas(batch.image_sizes, batch.tensor.shape[2:], maps.device).at(2 ** int(level[1:]))
        assert maps.shape[2:] == area.grid
        assert maps.any()
        assert not maps.masked_select(area.padding).any(), level


def parts_of_losses(model, images, targets, monkeypatch):
    """Losses as sums over anchors and proposals instead of means, and the gradient of their total."""
    counts, heads = {}, getattr(model, "roi_heads", None)
    if heads is None:
        model.loss_normalizer.fill_(100.0)
        counts = dict.fromkeys(("loss_cls", "loss_box_reg"), model.loss_normalizer)
    else:
        stages = heads.box_predictor if isinstance(heads.box_predictor, nn.ModuleList) else [heads.box_predictor]
        for number, predictor in enumerate(stages):
            suffix = f"_stage{number}" if len(stages) > 1 else ""

            def spy(scores, deltas, boxes, classes, *others, predictor=predictor, suffix=suffix):
                counts.update({f"loss_cls{suffix}": len(classes), f"loss_box_reg{suffix}": len(classes)})
                counts.setdefault("loss_mask", int((classes < predictor.num_classes).sum()))
                return type(predictor).losses(predictor, scores, deltas, boxes, classes, *others)

            monkeypatch.setattr(predictor, "losses", spy)
    losses = {name: loss * counts.get(name, len(images)) for name, loss in model(images, targets).items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(losses.values()), parameters)
    return torch.stack(list(losses.values())).detach().double(), torch.cat([g.flatten() for g in gradients]).double()


@pytest.mark.parametrize("name", DETECTORS)
def test_losses_and_gradients_are_the_sums_of_those_alone(name, monkeypatch):
    """Without batch norms, which mix images, and with samples of all anchors and proposals."""
    norms = ["model.backbone.norm=GN", "model.backbone.bottom_up.sample_ratio=1.0"]
    if name == "retinanet":
        norms += ["model.head.norm=GN"]
    else:
        heads = ["box_head"] if name == "mask_rcnn" else [f"box_heads.{stage}" for stage in range(3)]
        norms += [f"model.roi_heads.{head}.conv_norm=GN" for head in (*heads, "mask_head")]
        for part in ("proposal_generator", "roi_heads"):
            norms += [f"model.{part}.batch_size_per_image=20000", f"model.{part}.positive_fraction=0.5"]
    model = packed(name, *norms).train()
    sizes = [(96, 128), (75, 141), (40, 50)]
    images, targets = make_images(sizes), targets_of(sizes, (3, 3, 0))
    # At the edges, where an anchor in the padding would overlap most.
    targets[1]["boxes"][0] = torch.tensor([117.0, 51.0, 141.0, 75.0])
    alone = [parts_of_losses(model, [i], [t], monkeypatch) for i, t in zip(images, targets, strict=True)]
    losses, gradient = parts_of_losses(model, images, targets, monkeypatch)
    torch.testing.assert_close(losses, sum(x for x, _ in alone), rtol=2e-5, atol=1e-5)
    expected = sum(g for _, g in alone)
    limit = 5e-5 if name == "cascade_mask_rcnn" else 2e-5  # three stages round
    assert float((gradient - expected).norm() / expected.norm()) <= limit


@pytest.mark.parametrize("garbage", [3.0, float("nan")])
@pytest.mark.parametrize("norm", ["GN", "BN", "SyncBN", "naiveSyncBN_N"])
def test_norms_see_the_valid_area_alone(norm, garbage):
    torch.manual_seed(0)
    area = AREAS.at(4)
    layer = get_norm(norm, 64).train()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = (torch.randn(3, 64, *area.grid) + 5).masked_fill(area.padding, garbage).requires_grad_()
    actual = area.zero_padding(normalize(layer, x, area))
    weight = torch.randn(actual.shape)
    (actual * weight).sum().backward()
    cells = [area.crop(x.detach(), i) for i in range(3)]
    if norm == "GN":
        expected = [F.group_norm(c, 32, layer.weight, layer.bias) for c in cells]
    else:
        packed = torch.cat([c.flatten(2) for c in cells], 2)
        mean, var = packed.mean((0, 2)), packed.var((0, 2))
        expected = F.batch_norm(packed, None, None, layer.weight, layer.bias, training=True)
        expected = [
            w.view_as(c) for w, c in zip(expected.split([c[0, 0].numel() for c in cells], 2), cells, strict=True)
        ]
        torch.testing.assert_close(layer.running_mean, 0.1 * mean)
        torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * var)
    for i, w in enumerate(expected):
        torch.testing.assert_close(area.crop(actual, i), w, atol=1e-5, rtol=1e-5)
    assert not actual.masked_select(area.padding).any()
    assert x.grad.isfinite().all()
    assert not x.grad.masked_select(area.padding).any()


class Recorder:
    """An evaluator that records the result of each image."""

    def reset(self):
        self.found = {}

    def process(self, samples, results):
        self.found |= {sample["image_id"]: result for sample, result in zip(samples, results, strict=True)}

    def evaluate(self):
        return {}


@cache
def _model():
    return packed("mask_rcnn")


def _evaluate(folder, batch_size, mode):
    """Results of this process for its share of generated images of different sizes."""
    _model().backbone.bottom_up.batch_mode = mode
    demo = load("configs/demo.py", [f"train.output_dir={folder}"])
    demo.dataloader.evaluator = {"_target_": f"{Recorder.__module__}.{Recorder.__name__}"}
    demo.dataloader.test.mapper.augmentations = []
    if batch_size is not None:
        demo.dataloader.test.batch_size = batch_size
    evaluation = Evaluation.from_config(demo)
    evaluation.run(_model())
    return evaluation.evaluator.found


CASES = [(None, "canvas"), (2, "canvas"), (2, "packed")]


def _process(rank, folder):
    for world in (3, 2):
        if rank < world:
            dist.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
            torch.save([_evaluate(folder, *case) for case in CASES], f"{folder}/{world}-{rank}.pth")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Folder, and {number of processes: results of each rank}; the processes start once."""
    folder = tmp_path_factory.mktemp("processes")
    generate_shapes(folder / "shapes", 1, 7, (48, 96))
    torch.multiprocessing.spawn(_process, (str(folder),), nprocs=3)
    return folder, {n: [torch.load(folder / f"{n}-{rank}.pth") for rank in range(n)] for n in (2, 3)}


@pytest.mark.parametrize("case", range(len(CASES)), ids=["demo", "canvas", "packed"])
def test_an_evaluation_finds_the_same_with_any_number_of_processes(processes, case):
    folder, results = processes
    alone = _evaluate(folder, *CASES[case])
    assert len(alone) == 7
    assert sum(len(each["scores"]) for each in alone.values()) > 50
    for parts in results.values():
        shares = [part[case] for part in parts]
        assert sum(map(len, shares)) == 7
        for image, actual in (pair for share in shares for pair in share.items()):
            for key, value in alone[image].items():
                assert torch.equal(actual[key], value), (len(parts), image, key)


def test_the_demo_evaluates_as_it_predicts(processes):
    """With batch size 1: in a padded batch, the other images' sizes would matter."""
    folder, _ = processes
    single, demo = (_evaluate(folder, batch_size, "canvas") for batch_size in (1, None))
    assert all(torch.equal(demo[image]["boxes"], single[image]["boxes"]) for image in single)


def test_pooling_ends_with_the_image():
    """Boxes at an image's edges read its last cells, as at the end of a map, and no gradient leaves it."""
    torch.manual_seed(0)
    pooler = ROIPooler(3, (1 / 4, 1 / 8), canonical_box_size=16, canonical_level=3)
    levels = [AREAS.at(stride) for stride in (4, 8)]
    maps = [(torch.randn(3, 5, *a.grid) + 3).masked_fill(a.padding, torch.nan).requires_grad_() for a in levels]
    boxes = torch.tensor([[[0.0, 0, w, h], [w - 1.0, h - 1.0, w, h]] for h, w in AREAS.image_sizes])
    valid = torch.tensor([[True, True], [False, False], [True, False]])
    actual = pooler(maps, boxes, valid, AREAS)
    expected = [
        pooler([a.crop(m, i).contiguous() for a, m in zip(levels, maps, strict=True)], boxes[[i]], valid[[i]])
        for i in (0, 1, 2)
    ]
    assert torch.equal(actual, torch.cat(expected))
    for m, a, gradient in zip(maps, levels, torch.autograd.grad(actual.sum(), maps), strict=True):
        assert gradient.isfinite().all(), m.shape
        assert not gradient.masked_select(a.padding).any()


def test_anchors_in_the_padding_are_no_candidates():
    """An anchor in the padding may overlap most with a box at the edge: the best one inside must be foreground."""
    areas = ValidAreas([(8, 8), (8, 16)], (8, 16), torch.device("cpu"))
    (outside,) = outside_images([areas.at(8)], [1])
    assert outside.tolist() == [[False, True], [False, False]]
    anchors = torch.tensor([[-4.0, -4, 4, 4], [4.0, -4, 12, 4]])
    target = {"boxes": torch.tensor([[3.0, 0, 8, 4]]), "labels": torch.zeros(1, dtype=torch.int64)}
    matcher = Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True)
    _, labels = matcher(truth_of([target] * 2, masks=False), anchors, outside)
    assert labels.tolist() == [[1, -1], [0, 1]]
    assert outside_images([areas.at(16), None], [1, 1]) is None


class Bottom(nn.Module):
    """c4 and c5 of packed images, zero in the padding."""

    def output_shape(self):
        from mimdet.modeling import ShapeSpec

        return {"c4": ShapeSpec(channels=4, stride=16), "c5": ShapeSpec(channels=4, stride=32)}

    def forward(self, areas):
        torch.manual_seed(0)
        noise = torch.randn(len(areas.image_sizes), 4, 16, 16)
        levels = {"c4": areas.at(16), "c5": areas.at(32)}
        return PackedFeatures(
            {n: a.zero_padding(noise[:, :, : a.grid[0], : a.grid[1]].clone()) for n, a in levels.items()}, areas
        )


@pytest.mark.parametrize("in_feature", ["c5", "p5"])
def test_coarsest_levels_do_not_read_what_bias_leaves_in_the_padding(in_feature):
    pyramid = FPN(Bottom(), ["c4", "c5"], 4, top_block=LastLevelP6P7(4, 4, in_feature))
    fill_module(pyramid)
    sizes, device = [(100, 70), (256, 256)], torch.device("cpu")
    together = pyramid(ValidAreas(sizes, (256, 256), device))
    alone = pyramid(ValidAreas(sizes[:1], (128, 96), device))
    for name, expected in alone.items():
        rows, columns = together.areas.at(2 ** int(name[1:])).sizes[0]
        torch.testing.assert_close(together[name][:1, :, :rows, :columns], expected[:, :, :rows, :columns])
