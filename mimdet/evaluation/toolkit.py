"""One interface to the two toolkits that compute COCO AP."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

TOOLKITS = ("faster_coco_eval", "pycocotools")
_AREAS = ("all", "small", "medium", "large")


def choose_toolkit(name: str = "auto") -> str:
    """``name``, or for ``"auto"`` the first installed one of :data:`TOOLKITS`, the fastest.

    Raises:
        ValueError: unknown name.
        ImportError: the named toolkit is not installed.
    """
    if name not in ("auto", *TOOLKITS):
        raise ValueError(f"unknown COCO toolkit {name!r}: choose auto, {' or '.join(TOOLKITS)}")
    for candidate in TOOLKITS if name == "auto" else (name,):
        try:
            _classes(candidate)
        except ImportError as error:
            reason = error
        else:
            return candidate
    raise ImportError(
        f"COCO evaluation with {name!r} needs a package that cannot be imported ({reason}); "
        f"install {'pycocotools' if name == 'auto' else name.replace('_', '-')}"
    )


def coco_metrics(
    toolkit: str,
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    iou_type: str,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    max_dets: int,
) -> tuple[dict[str, float], dict[int, float]]:
    """AP and AR of ``detections`` as fractions; NaN where the ground truth has no object.

    Args:
        toolkit: one of :data:`TOOLKITS`.
        ground_truth: a COCO annotation file's content. The toolkits add keys to its annotations.
        detections: COCO results; for ``iou_type="segm"`` without ``bbox``: the toolkits would take an object's
            area, and so APs, APm or APl, from the box.
        iou_type: ``"bbox"`` or ``"segm"``.
        image_ids: the images to evaluate.
        category_ids: the categories to evaluate.
        max_dets: number of detections of each image and category that count, highest scores first.

    Returns:
        the metrics AP, AP50, AP75, APs, APm, APl and AR<max_dets>, and the AP of each category id.
    """
    coco_class, eval_class = _classes(toolkit)
    # pycocotools prints its progress
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(coco_class, ground_truth)
        # pycocotools' loadRes fails on an empty list
        predictions = (
            truth.loadRes(detections) if detections else _index(coco_class, {**ground_truth, "annotations": []})
        )
        run = eval_class(truth, predictions, iou_type)
        run.params.imgIds = sorted(image_ids)
        run.params.catIds = sorted(category_ids)
        run.params.maxDets = [max_dets]
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval["precision"])[..., 0]  # (IoU threshold, recall level, category, area)
    recall = np.asarray(run.eval["recall"])[..., 0]  # (IoU threshold, category, area)
    every, small, medium, large = (run.params.areaRngLbl.index(area) for area in _AREAS)
    at50, at75 = (int(np.abs(run.params.iouThrs - iou).argmin()) for iou in (0.5, 0.75))
    metrics = {
        "AP": _mean(precision[..., every]),
        "AP50": _mean(precision[at50, ..., every]),
        "AP75": _mean(precision[at75, ..., every]),
        "APs": _mean(precision[..., small]),
        "APm": _mean(precision[..., medium]),
        "APl": _mean(precision[..., large]),
        f"AR{max_dets}": _mean(recall[..., every]),
    }
    per_category = {int(category): _mean(precision[:, :, k, every]) for k, category in enumerate(run.params.catIds)}
    return metrics, per_category


def _classes(toolkit: str) -> tuple[Callable, Callable]:
    if toolkit == "pycocotools":
        return (
            importlib.import_module("pycocotools.coco").COCO,
            importlib.import_module("pycocotools.cocoeval").COCOeval,
        )
    package = importlib.import_module("faster_coco_eval")
    return package.COCO, functools.partial(package.COCOeval_faster, print_function=logger.debug)


def _index(coco_class: Callable, content: dict[str, Any]) -> Any:
    coco = coco_class()
    coco.dataset = content
    coco.createIndex()
    return coco


def _mean(values: np.ndarray) -> float:
    """Mean without -1, which the toolkits return where there is no ground truth."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else float("nan")
