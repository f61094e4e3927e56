"""The two programs that compute COCO AP, behind one face."""

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
    """``name`` itself, or for ``"auto"`` the fastest installed one of :data:`TOOLKITS`.

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


def coco_figures(
    toolkit: str,
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    iou_type: str,
    image_ids: Sequence[int],
    category_ids: Sequence[int],
    max_dets: int,
) -> tuple[dict[str, float], dict[int, float]]:
    """AP and AR of ``detections`` as fractions; NaN where the ground truth has no object to find.

    Args:
        toolkit: one of :data:`TOOLKITS`.
        ground_truth: a COCO annotation file's content. The toolkits add keys to its annotations.
        detections: COCO results; for ``iou_type="segm"`` without ``bbox``, from which the toolkits would take
            the object's area and so sort it into APs, APm or APl.
        iou_type: ``"bbox"`` or ``"segm"``.
        image_ids: the images to evaluate.
        category_ids: the categories to evaluate.
        max_dets: the highest-scoring detections of each image and category that count.

    Returns:
        the figures AP, AP50, AP75, APs, APm, APl and AR<max_dets>, and the AP of each category id.
    """
    coco_class, eval_class = _classes(toolkit)
    # pycocotools reports its progress with print
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _index(coco_class, ground_truth)
        # loadRes of pycocotools fails on an empty list
        found = truth.loadRes(detections) if detections else _index(coco_class, {**ground_truth, "annotations": []})
        run = eval_class(truth, found, iou_type)
        run.params.imgIds = sorted(image_ids)
        run.params.catIds = sorted(category_ids)
        run.params.maxDets = [max_dets]
        run.evaluate()
        run.accumulate()
    precision = np.asarray(run.eval["precision"])[..., 0]  # (IoU threshold, recall level, category, area)
    recall = np.asarray(run.eval["recall"])[..., 0]  # (IoU threshold, category, area)
    every, small, medium, large = (run.params.areaRngLbl.index(area) for area in _AREAS)
    at50, at75 = (int(np.abs(run.params.iouThrs - iou).argmin()) for iou in (0.5, 0.75))
    figures = {
        "AP": _mean(precision[..., every]),
        "AP50": _mean(precision[at50, ..., every]),
        "AP75": _mean(precision[at75, ..., every]),
        "APs": _mean(precision[..., small]),
        "APm": _mean(precision[..., medium]),
        "APl": _mean(precision[..., large]),
        f"AR{max_dets}": _mean(recall[..., every]),
    }
    per_category = {int(category): _mean(precision[:, :, k, every]) for k, category in enumerate(run.params.catIds)}
    return figures, per_category


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
    """Mean over what was measured: the toolkits mark figures without ground truth by -1."""
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else float("nan")
