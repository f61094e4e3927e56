"""Collect a detector's results and score them against a COCO dataset."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..files import write_json
from .ground_truth import load_ground_truth
from .results import to_coco_results
from .toolkit import choose_toolkit, coco_metrics

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"


class EvaluationDataset(Protocol):
    """Attributes of a dataset that the evaluator reads."""

    json_file: str
    classes: Sequence[str]
    category_ids: Sequence[int]


class COCOEvaluator:
    """Box and mask AP as COCO defines them.

    Use: ``reset()``, ``process()`` for every batch on every rank, then ``evaluate()`` on every rank.

    Args:
        dataset: has ``json_file``, the ground truth, and for each label its name in ``classes`` and its id in
            ``category_ids``; if its ``use_masks`` is False, boxes alone are scored. May be set later as the
            attribute ``dataset``.
        output_dir: folder for ``coco_instances_results.json``; None writes no file.
        max_dets_per_image: detections of an image and category that count, highest scores first.
        toolkit: ``"faster_coco_eval"``, ``"pycocotools"`` or ``"auto"`` (the first if installed); their
            metrics are the same.

    Raises:
        ValueError, ImportError: the toolkit is unknown or not installed.
    """

    def __init__(
        self,
        dataset: EvaluationDataset | None = None,
        output_dir: str | Path | None = None,
        max_dets_per_image: int | None = 100,
        toolkit: str = "auto",
    ):
        self.dataset = dataset
        self.output_dir = output_dir
        self.max_dets_per_image = 100 if max_dets_per_image is None else max_dets_per_image
        self.toolkit = choose_toolkit(toolkit)
        self._ground_truth: tuple[str, dict[str, Any], bool] | None = None
        self._results: dict[int, list[dict[str, Any]]] = {}
        self._saw_masks = False

    def reset(self) -> None:
        """Forget all results, and load the ground truth, to report its errors before inference."""
        self._results = {}
        self._saw_masks = False
        if self.dataset is not None and _rank() == 0:
            self._load_ground_truth()

    def process(self, samples: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, torch.Tensor]]) -> None:
        """Add the results of one batch.

        Args:
            samples: dicts with ``image_id``.
            results: for each sample a dict of ``boxes`` (N, 4) xyxy in pixels of the original image,
                ``scores`` (N,), ``labels`` (N,) and, optionally, ``masks`` (N, height, width) bool.

        Raises:
            ValueError: no dataset, a label without category, or different numbers of samples and results.
        """
        category_ids = self._need_dataset().category_ids
        for sample, result in zip(samples, results, strict=True):
            image_id = int(sample["image_id"])
            # DistributedSampler may repeat an image to even out the ranks; it counts once
            self._results[image_id] = to_coco_results(result, image_id, category_ids)
            self._saw_masks |= "masks" in result

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather the results of all ranks and score them. Every rank must call it.

        Only processed images are scored; a log line says so when the dataset has more.

        Returns:
            on rank 0: ``bbox`` and, with masks, ``segm``: AP, AP50, AP75, APs, APm, APl and AR<n> as
            fractions, NaN without ground truth; ``bbox_per_class`` and ``segm_per_class``: AP by
            class name. On other ranks an empty dict.

        Raises:
            ValueError: no dataset, no image was processed, or one is not in the ground truth.
        """
        dataset = self._need_dataset()
        gathered = gather((self._results, self._saw_masks))
        if gathered is None:
            return {}
        results = {image_id: result for part, _ in gathered for image_id, result in part.items()}
        ground_truth, truth_has_masks = self._load_ground_truth()
        self._check_images(results, ground_truth)

        detections = [detection for image_id in sorted(results) for detection in results[image_id]]
        if self.output_dir:
            write_json(Path(self.output_dir).expanduser() / RESULTS_FILE, detections)
        if not detections:
            logger.warning("no object was detected in any of %d images: every AP is 0", len(results))

        # COCO toolkits take an object's area from its box where there is one: each task drops the other's key
        tasks = {"bbox": "segmentation"}
        if any(saw_masks for _, saw_masks in gathered):
            if truth_has_masks:
                tasks["segm"] = "bbox"
            else:
                logger.warning("%s has no masks: only box AP is measured", dataset.json_file)
        metrics = {}
        for task, other in tasks.items():
            stripped = [{k: v for k, v in detection.items() if k != other} for detection in detections]
            metrics |= self._score(task, stripped, ground_truth, list(results))
        return metrics

    def _score(
        self, task: str, detections: list[dict[str, Any]], ground_truth: dict[str, Any], image_ids: list[int]
    ) -> dict[str, dict[str, float]]:
        start = time.perf_counter()
        names = dict(zip(self.dataset.category_ids, self.dataset.classes, strict=True))
        metrics, per_category = coco_metrics(
            self.toolkit, ground_truth, detections, task, image_ids, list(names), self.max_dets_per_image
        )
        seconds = time.perf_counter() - start
        logger.info("%s AP of %d images by %s in %.1f s", task, len(image_ids), self.toolkit, seconds)
        return {
            task: metrics,
            f"{task}_per_class": {names[category]: ap for category, ap in per_category.items()},
        }

    def _need_dataset(self) -> EvaluationDataset:
        if self.dataset is None:
            raise ValueError("COCOEvaluator has no dataset: pass dataset=... or set its attribute before use")
        return self.dataset

    def _load_ground_truth(self) -> tuple[dict[str, Any], bool]:
        json_file = str(self._need_dataset().json_file)
        if self._ground_truth is None or self._ground_truth[0] != json_file:
            use_masks = getattr(self.dataset, "use_masks", True)
            self._ground_truth = (json_file, *load_ground_truth(json_file, use_masks))
        return self._ground_truth[1:]

    def _check_images(self, results: Mapping[int, Any], ground_truth: dict[str, Any]) -> None:
        if not results:
            raise ValueError("no image was processed: the loader of the evaluation gave none")
        known = {image["id"] for image in ground_truth["images"]}
        unknown = sorted(results.keys() - known)
        if unknown:
            raise ValueError(
                f"{self.dataset.json_file} has no image with id {unknown[0]} ({len(unknown)} such ids): "
                f"the evaluator's dataset is not the one that the loader reads"
            )
        if len(results) < len(known):
            logger.warning("scoring the %d processed images of the dataset's %d", len(results), len(known))


def gather(value: Any) -> list[Any] | None:
    """``value`` of every rank, on rank 0; None on the others. With one process, ``[value]``."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    # gather_object over gloo: NCCL would need GPU memory
    group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
    gathered = [None] * dist.get_world_size() if _rank() == 0 else None
    try:
        dist.gather_object(value, gathered, dst=0, group=group)
    finally:
        if group is not None:
            dist.destroy_process_group(group)
    return gathered


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
