"""Data loaders for training and for evaluation."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .sampler import AspectRatioBatchSampler, TrainingSampler


def build_detection_train_loader(
    dataset: Dataset,
    mapper: Callable,
    total_batch_size: int,
    num_workers: int = 4,
    aspect_ratio_grouping: bool = True,
    seed: int = 0,
    start_batch: int = 0,
) -> DataLoader:
    """Endless loader of batches, each a list of samples.

    The batches depend on the seed, the number of processes and `total_batch_size`, not on `num_workers`; the
    global random state is neither read nor changed. Every `iter()` starts at `start_batch`. Rank and world
    size come from torch.distributed where it is initialised.

    Args:
        dataset: a CocoDataset, or any dataset of its records that has `sizes`.
        mapper: called as `mapper(record, rng)`, see DatasetMapper.
        total_batch_size: images in a step over all processes.
        num_workers: worker processes of this rank; 0 loads in this process.
        aspect_ratio_grouping: keep images wider than high apart from the others, which saves padding.
        start_batch: number of steps to skip, so that a resumed run goes on where it stopped.

    Raises ValueError when `total_batch_size` does not divide by the number of processes, and DataError, while
    iterating, for data that cannot be used.
    """
    rank, world_size = _rank_and_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            f"total_batch_size must be a positive multiple of the number of processes, {world_size}; "
            f"got {total_batch_size}"
        )
    groups = (dataset.sizes[:, 1] > dataset.sizes[:, 0]).tolist() if aspect_ratio_grouping else None
    batches = AspectRatioBatchSampler(
        TrainingSampler(len(dataset), seed),
        total_batch_size // world_size,
        groups,
        rank,
        world_size,
        start_batch,
    )
    return _loader(dataset, mapper, batches, num_workers)


def build_detection_test_loader(
    dataset: Dataset, mapper: Callable, batch_size: int = 1, num_workers: int = 4
) -> DataLoader:
    """Loader that gives every image once, in order, each a sample in a list of up to `batch_size`.

    Where torch.distributed is initialised, every rank gets a contiguous share of the batches. They are the same for
    any number of processes, and so is what a detector finds whose result depends on what an image is batched with.
    """
    rank, world_size = _rank_and_world_size()
    items = [(index, (index,)) for index in range(len(dataset))]
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    share = slice(len(batches) * rank // world_size, len(batches) * (rank + 1) // world_size)
    return _loader(dataset, mapper, batches[share], num_workers)


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _loader(dataset: Dataset, mapper: Callable, batches, num_workers: int) -> DataLoader:
    return _DetectionLoader(
        MappedDataset(dataset, mapper),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_as_list,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader would otherwise draw its workers' seed from the global one.
        generator=torch.Generator(),
    )


def _as_list(samples: list) -> list:
    return samples


class MappedDataset(Dataset):
    """Samples of a dataset: item (index, seed) is `mapper(dataset[index], numpy.random.default_rng(seed))`.

    A DataError is returned, not raised, for the loader to raise: DataLoader would bury its message in a
    worker's traceback.
    """

    def __init__(self, dataset: Dataset, mapper: Callable):
        self.dataset = dataset
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple) -> dict | DataError:
        index, seed = item
        try:
            return self.mapper(self.dataset[index], np.random.default_rng(seed))
        except DataError as error:
            return error


class _DetectionLoader(DataLoader):
    def __iter__(self) -> Iterator[list[dict]]:
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, DataError):
                    raise sample
            yield batch
