"""Statistics of the datasets of a config, and all their problems, before a training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from ..config import instantiate
from ..config.lazy import TARGET, resolve_target
from .annotations import first, is_ignored
from .coco import CocoDataset, Split, read_image, read_split
from .errors import DataError


@dataclass(frozen=True)
class DatasetReport:
    """Statistics of a dataset, from its valid entries, and all its problems.

    Attributes:
        problems: each names file, entry and field.
        counts: name -> number.
        pixels: name -> minimum, median and maximum size in pixels; empty without images or instances.
        classes: name -> number of instances, in order of label.
    """

    problems: list[str]
    counts: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)


def check_config(cfg: DictConfig, decode: bool = False) -> dict[str, DatasetReport]:
    """Check the datasets of `dataloader.train` and, where there is one, `dataloader.test`.

    Args:
        cfg: the whole config. Its datasets must be CocoDatasets; others raise a ValueError.
        decode: open every image that is used.

    Returns:
        reports by "train" and "test". Different classes are a problem of "test".
    """
    reports = {}
    for split in ("train", "test"):
        node = cfg.dataloader.get(split)
        if not node:
            continue
        if (target := resolve_target(node.dataset[TARGET])) is not CocoDataset:
            raise ValueError(f"dataloader.{split}.dataset is {target!r}: only a CocoDataset can be checked")
        arguments = {key: instantiate(value) for key, value in node.dataset.items() if key != TARGET}
        reports[split] = check_dataset(**arguments, decode=decode)
    trained, tested = (list(reports[split].classes) if split in reports else [] for split in ("train", "test"))
    if trained and tested and trained != tested:
        reports["test"].problems.append(
            f"the training set has {len(trained)} classes ({first(trained)}), the test set {len(tested)} "
            f"({first(tested)}): they must be the same, in the same order"
        )
    return reports


def check_dataset(*, decode: bool = False, progress: bool = True, **arguments) -> DatasetReport:
    """Check the files of a CocoDataset with these arguments; CocoDataset itself raises the first problem.

    Args:
        decode: decode every image that is used, and compare its size with the annotation file.
        progress: show a progress bar meanwhile.
    """
    problems: list[str] = []
    try:
        split = read_split(**arguments, report=problems.append)
    except DataError as error:
        return DatasetReport([*problems, str(error)])
    if decode:
        problems += _undecodable(split.records, progress)
    return DatasetReport(problems, _counts(split), _pixels(split), _classes(split))


def report_tables(name: str, report: DatasetReport) -> Group:
    """The statistics of a report for the console."""
    counts = Table(box=SIMPLE_HEAD, title=f"{name}: counts", title_justify="left", show_header=False)
    for what, count in report.counts.items():
        counts.add_row(what, str(count))
    pixels = Table("", "min", "median", "max", box=SIMPLE_HEAD, title=f"{name}: pixels", title_justify="left")
    for what, sizes in report.pixels.items():
        pixels.add_row(what, *(f"{size:.6g}" for size in sizes))
    columns = min(2, len(report.classes))
    classes = Table(*["class", "instances"] * columns, box=SIMPLE_HEAD, title=f"{name}: classes", title_justify="left")
    entries = list(report.classes.items())
    height = -(-len(entries) // max(1, columns))
    for row in range(height):
        classes.add_row(*(Text(str(cell)) for entry in entries[row::height] for cell in entry))
    return Group(*(table for table in (counts, pixels, classes) if table.row_count))


def _counts(split: Split) -> dict[str, int]:
    used = sum(len(record["labels"]) > 0 for record in split.records)
    return {
        "images": len(split.images),
        "images without a usable instance": len(split.images) - used,
        "instances": sum(len(record["labels"]) for record in split.records),
        "annotations of crowds or to ignore": sum(map(is_ignored, split.annotations)),
        **{f"instances skipped {cause}": len(ids) for cause, ids in split.skipped.items()},
    }


def _pixels(split: Split) -> dict[str, tuple[float, float, float]]:
    boxes = np.concatenate([np.zeros((0, 4)), *(record["boxes"] for record in split.records)])
    sizes = {
        "image width": [image["width"] for image in split.images],
        "image height": [image["height"] for image in split.images],
        "box width": boxes[:, 2] - boxes[:, 0],
        "box height": boxes[:, 3] - boxes[:, 1],
    }
    return {what: (min(s), float(np.median(s)), max(s)) for what, s in sizes.items() if len(s)}


def _classes(split: Split) -> dict[str, int]:
    counts = Counter(label for record in split.records for label in record["labels"].tolist())
    return {category["name"]: counts[label] for label, category in enumerate(split.categories)}


def _undecodable(records: Iterable[dict], progress: bool) -> Iterator[str]:
    records = [record for record in records if os.path.isfile(record["file_name"])]  # the others were reported
    pool = ThreadPoolExecutor()  # decoders release the GIL
    try:
        with Progress(disable=not progress) as bar:
            problems = bar.track(pool.map(_decode, records), total=len(records), description="decoding images")
            yield from filter(None, problems)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(record: dict) -> str | None:
    try:
        read_image(record)
    except DataError as error:
        return str(error)
    return None
