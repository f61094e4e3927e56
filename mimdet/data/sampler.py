"""Samplers of the training batches; a pure function of the seed."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice

import numpy as np
from torch.utils.data import Sampler


class TrainingSampler(Sampler):
    """Endless stream of (dataset index, sample seed), every epoch a fresh permutation of the dataset.

    The permutation depends on (seed, epoch) alone, and the sample seed, a tuple for
    `numpy.random.default_rng`, on (seed, epoch, index) alone.
    """

    def __init__(self, size: int, seed: int = 0):
        if size < 1:
            raise ValueError("cannot sample from an empty dataset")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.size = size
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        # SeedSequence: 0 is for permutations, 1 for samples.
        for epoch in count():
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.size)
            for index in order.tolist():
                yield index, (self.seed, 1, epoch, index)


class AspectRatioBatchSampler(Sampler):
    """Endless batches of a sampler's items in which all images belong to one group.

    Batches are in the order in which they fill up. Rank r of w gets batches r, r + w, ... of a sequence that does not
    depend on w.

    Args:
        sampler: yields items whose first element is a dataset index.
        batch_size: images in a batch, on one rank.
        groups: group of every dataset index, such as width > height; None puts all in one.
        start_batch: number of this rank's batches to skip, for a resumed run.
    """

    def __init__(
        self,
        sampler: Iterable[tuple],
        batch_size: int,
        groups: Sequence | None = None,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ):
        self.sampler = sampler
        self.batch_size = batch_size
        self.groups = None if groups is None else list(groups)
        self.rank = rank
        self.world_size = world_size
        self.start_batch = start_batch

    def __iter__(self) -> Iterator[list[tuple]]:
        return islice(self._batches(), self.start_batch * self.world_size + self.rank, None, self.world_size)

    def _batches(self) -> Iterator[list[tuple]]:
        waiting = {}
        for item in self.sampler:
            group = None if self.groups is None else self.groups[item[0]]
            batch = waiting.setdefault(group, [])
            batch.append(item)
            if len(batch) == self.batch_size:
                yield waiting.pop(group)
