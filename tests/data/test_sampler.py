"""Order of the samples, and the loaders built on it."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from test_coco import content, instance

from mimdet.data import (
    AspectRatioBatchSampler,
    CocoDataset,
    DataError,
    DatasetMapper,
    RandomFlip,
    ResizeShortestEdge,
    TrainingSampler,
    build_detection_test_loader,
    build_detection_train_loader,
)

WIDE = [True, False, True, True, False, True, True]


def indices(batches):
    return [[index for index, _ in batch] for batch in batches]


def test_every_epoch_is_a_permutation_of_its_own():
    stream = [index for index, _ in islice(TrainingSampler(50, seed=3), 150)]
    epochs = [stream[:50], stream[50:100], stream[100:]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_stream_depends_on_the_seed_alone():
    first, again, other = (list(islice(TrainingSampler(20, seed), 60)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_sample_seeds_never_repeat():
    seeds = [seed for _, seed in islice(TrainingSampler(20, seed=0), 200)]
    draws = {np.random.default_rng(seed).integers(2**63) for seed in seeds}
    assert len(draws) == 200


@pytest.mark.parametrize(("size", "seed", "message"), [(0, 0, "empty"), (5, -1, "negative")])
def test_sampler_refuses(size, seed, message):
    with pytest.raises(ValueError, match=message):
        TrainingSampler(size, seed)


def test_batches_keep_to_one_group_and_lose_nothing():
    batches = indices(islice(AspectRatioBatchSampler(TrainingSampler(7), 3, WIDE), 70))
    assert all(len({WIDE[index] for index in batch}) == 1 for batch in batches)
    counts = np.bincount(np.concatenate(batches))
    assert len(counts) == 7
    assert counts.max() - counts.min() <= 1


def test_batches_without_groups_follow_the_stream():
    stream = [index for index, _ in islice(TrainingSampler(7), 12)]
    assert np.concatenate(indices(islice(AspectRatioBatchSampler(TrainingSampler(7), 3), 4))).tolist() == stream


@pytest.mark.parametrize("groups", [None, WIDE], ids=["ungrouped", "grouped"])
def test_ranks_take_turns(groups):
    def batches(rank=0, world_size=1, count=12):
        return list(islice(AspectRatioBatchSampler(TrainingSampler(7), 2, groups, rank, world_size), count))

    ranks = [batches(rank, 3, 4) for rank in range(3)]
    assert [batch for step in zip(*ranks, strict=True) for batch in step] == batches()


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_resuming_continues_the_run(rank, world_size):
    def batches(start):
        return AspectRatioBatchSampler(TrainingSampler(7), 2, WIDE, rank, world_size, start_batch=start)

    assert list(islice(batches(13), 10)) == list(islice(batches(0), 13, 23))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Twelve images, of which every third is higher than wide."""
    root = tmp_path_factory.mktemp("set")
    images, annotations = [], []
    for i in range(12):
        width, height = (30, 40) if i % 3 == 0 else (40, 30)
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        annotations.append(instance(i, i, bbox=[2, 2, 10, 8], segmentation=[[2, 2, 12, 2, 12, 10]]))
    (root / "set.json").write_text(json.dumps(content(annotations) | {"images": images}))
    return CocoDataset(json_file=root / "set.json", image_root=root)


@pytest.fixture
def mapper():
    return DatasetMapper(True, [RandomFlip(), ResizeShortestEdge((24, 48))])


def assert_same(ours, others):
    assert len(ours) == len(others)
    for batch, other in zip(ours, others, strict=True):
        assert [sample["image_id"] for sample in batch] == [sample["image_id"] for sample in other]
        for a, b in zip(batch, other, strict=True):
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["targets"]["boxes"], b["targets"]["boxes"])
            np.testing.assert_array_equal(a["targets"]["masks"][0][0], b["targets"]["masks"][0][0])


def take(dataset, mapper, count, **options):
    loader = build_detection_train_loader(dataset, mapper, **{"total_batch_size": 2, "num_workers": 0, **options})
    return list(islice(loader, count))


def test_training_batches_group_by_shape(dataset, mapper):
    for batch in take(dataset, mapper, 12):
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1
    mixed = take(dataset, mapper, 12, aspect_ratio_grouping=False)
    assert any(len({sample["width"] > sample["height"] for sample in batch}) == 2 for batch in mixed)


def test_workers_do_not_change_the_batches(dataset, mapper):
    assert_same(take(dataset, mapper, 8), take(dataset, mapper, 8, num_workers=2))


def test_resumed_loader_sees_the_same_samples(dataset, mapper):
    assert_same(take(dataset, mapper, 9)[5:], take(dataset, mapper, 4, start_batch=5))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_random_state_is_left_alone(dataset, mapper, num_workers):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(dataset, mapper, 2, num_workers=num_workers)
    list(build_detection_test_loader(dataset, DatasetMapper(False, []), num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


@pytest.fixture
def as_rank(monkeypatch):
    """Mocks torch.distributed."""

    def set_rank(rank, world_size):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)

    return set_rank


def test_ranks_share_the_training_batches(dataset, mapper, as_rank):
    alone = take(dataset, mapper, 6)
    ranks = []
    for rank in range(2):
        as_rank(rank, 2)
        ranks.append(take(dataset, mapper, 3, total_batch_size=4))
    assert_same([batch for step in zip(*ranks, strict=True) for batch in step], alone)


def test_total_batch_size_must_divide(dataset, mapper, as_rank):
    as_rank(0, 3)
    with pytest.raises(ValueError, match="multiple of the number of processes, 3; got 4"):
        build_detection_train_loader(dataset, mapper, total_batch_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 5, 13])
def test_every_image_is_evaluated_once(dataset, as_rank, world_size):
    seen = []
    for rank in range(world_size):
        as_rank(rank, world_size)
        loader = build_detection_test_loader(dataset, DatasetMapper(False, []), batch_size=2, num_workers=0)
        batches = list(loader)
        assert len(loader) == len(batches)
        seen += [sample["image_id"] for batch in batches for sample in batch]
    assert seen == list(range(12))


def test_test_loader_keeps_order_with_workers(dataset):
    loader = build_detection_test_loader(dataset, DatasetMapper(False, []), num_workers=2)
    assert [sample["image_id"] for batch in loader for sample in batch] == list(range(12))


class Broken:
    """A mapper that fails at one image."""

    def __init__(self, error):
        self.error = error

    def __call__(self, record, rng):
        if record["image_id"] == 3:
            raise self.error
        return record


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("error", [DataError("image 3 is damaged"), ZeroDivisionError("oops")], ids=repr)
def test_a_mappers_errors_arrive_and_only_other_ones_with_the_workers_traceback(dataset, num_workers, error):
    with pytest.raises(type(error), match=str(error)) as caught:
        list(build_detection_test_loader(dataset, Broken(error), num_workers=num_workers))
    as_raised = num_workers == 0 or isinstance(error, DataError)
    assert (str(caught.value) == str(error)) == as_raised
