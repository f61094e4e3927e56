"""Data loaders for training and for evaluation."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .sampler import AspectRatioBatchSampler, TrainingSampler

# Signals that stop a training with a checkpoint: Ctrl-C, a batch system, a lost connection, Slurm's early warning.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
)
_CHECK_SECONDS = 5.0
_LOST_CONNECTION = (ConnectionError, EOFError, FileNotFoundError)


def stop_signals() -> list[signal.Signals]:
    """:data:`STOP_SIGNALS`, without a SIGHUP that is ignored: `nohup` sets that, to outlive the terminal."""
    ignored = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signum for signum in STOP_SIGNALS if not (ignored and signum == signal.SIGHUP)]


class LoaderWorkerError(RuntimeError):
    """A worker process of a loader died."""


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
    size come from torch.distributed where it is initialized.

    Args:
        dataset: a CocoDataset, or any dataset of its records that has `sizes`.
        mapper: called as `mapper(record, rng)`, see DatasetMapper.
        total_batch_size: images in a step, over all processes.
        num_workers: worker processes of this rank; 0 loads in this process.
        aspect_ratio_grouping: batches have images wider than high or others, not both, which saves padding.
        start_batch: number of steps to skip, for a resumed run.

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
    """Loader that yields every image once, in order, in lists of up to `batch_size` samples.

    Where torch.distributed is initialized, every rank gets a contiguous range of the batches. The batches are the same
    for any number of processes; detections are too, also where they depend on the other images of a batch.
    """
    rank, world_size = _rank_and_world_size()
    items = [(index, (index,)) for index in range(len(dataset))]
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    rank_range = slice(len(batches) * rank // world_size, len(batches) * (rank + 1) // world_size)
    return _loader(dataset, mapper, batches[rank_range], num_workers)


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
        # DataLoader would draw its workers' seed from the global generator.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_the_parent,
    )


def _as_list(samples: list) -> list:
    return samples


class MappedDataset(Dataset):
    """Samples of a dataset: item (index, seed) is `mapper(dataset[index], numpy.random.default_rng(seed))`.

    A DataError is returned, and raised in the main process: DataLoader would bury its message in a worker's traceback.
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
        with _stop_signals_blocked():  # workers inherit the signal mask
            batches = super().__iter__()
        while True:
            try:
                with explained_dead_worker(self.num_workers):
                    batch = next(batches, None)
            except LoaderWorkerError:
                with suppress(RuntimeError):  # DataLoader's SIGCHLD handler may raise for the same worker again
                    batches._shutdown_workers()
                raise
            if batch is None:
                return
            for sample in batch:
                if isinstance(sample, DataError):
                    raise sample
            yield batch


@contextmanager
def explained_dead_worker(num_workers: int = 0) -> Iterator[None]:
    """Raise LoaderWorkerError instead of DataLoader's error when a worker died.

    That is a RuntimeError, or an error of the connection if the worker dies while its tensors are fetched; only a
    loader with ``num_workers`` has a connection.
    """
    try:
        yield
    except LoaderWorkerError:
        raise
    except (RuntimeError, *_LOST_CONNECTION) as error:
        lost = isinstance(error, _LOST_CONNECTION) and num_workers and "in DataLoader worker process" not in str(error)
        if not lost and "DataLoader worker (pid" not in str(error):
            raise
        cause = error.__cause__ if isinstance(error.__cause__, RuntimeError) else error  # it names the signal
        text = f"a loader worker died: {str(cause).strip().rstrip('.') or type(error).__name__}"
        if lost or "signal: Killed" in text or "exited unexpectedly" in text:
            text += (
                ". The system probably ran out of memory: use fewer workers, dataloader.train.num_workers and "
                "dataloader.test.num_workers"
            )
        raise LoaderWorkerError(text) from error


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "sigtimedwait"):  # macOS, for example: workers could not tell who sent a SIGTERM
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        if multiprocessing.get_start_method() != "fork":
            resource_tracker.ensure_running()  # starting it unblocks SIGINT and SIGTERM
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_parent(worker_id: int) -> None:
    """``worker_init_fn``: a worker survives stop signals to its whole process group or cgroup.

    The training process needs batches to finish the step. The worker ends when the parent sends SIGTERM, as DataLoader
    does, or is gone.
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    pids = multiprocessing.parent_process().pid, os.getppid()
    threading.Thread(target=_end_with_parent, args=pids, daemon=True).start()


def _end_with_parent(loader_pid: int, parent_pid: int) -> None:
    # With a fork server, loader_pid is not the parent's.
    while os.getppid() == parent_pid:
        received = signal.sigtimedwait({signal.SIGTERM}, _CHECK_SECONDS)
        if received is not None and received.si_pid == loader_pid:
            break
    os._exit(0)  # DataLoader reports exit codes other than 0 as errors
