"""Run a detector over the test set and score it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn

from ..config import check_config, instantiate, override_keys
from ..data.loader import LoaderWorkerError
from ..evaluation import format_results
from .final_config import final_config
from .logger import RunLog
from .model import build_model
from .runtime import build_fabric, describe
from .signals import GracefulStop
from .step import inputs_of
from .weights import load_model_weights

logger = logging.getLogger(__name__)

_REPORT_SECONDS = 30.0


class EvaluationInterruptedError(Exception):
    """The evaluation was stopped before its end."""


class Evaluation:
    """A test loader with its evaluator; may run several times.

    Attributes:
        dataset, loader, evaluator: as built from ``dataloader.test`` and ``dataloader.evaluator``.
    """

    def __init__(self, dataset: Any, loader: Iterable[list[dict]], evaluator: Any):
        self.dataset = dataset
        self.loader = loader
        self.evaluator = evaluator

    @classmethod
    def from_config(cls, cfg: DictConfig, loader: Iterable[list[dict]] | None = None) -> Evaluation:
        """Build the loader and evaluator of ``cfg.dataloader``; ``loader`` replaces the config's."""
        if loader is None:
            dataset = instantiate(cfg.dataloader.test.dataset)
            loader = instantiate(cfg.dataloader.test, dataset=dataset)
        else:
            dataset = getattr(loader.dataset, "dataset", loader.dataset)
        evaluator = instantiate(cfg.dataloader.evaluator)
        evaluator.dataset = dataset
        evaluator.reset()  # reads the ground truth: report its errors before training
        return cls(dataset, loader, evaluator)

    def run(self, model: nn.Module, stop: GracefulStop | None = None) -> dict[str, Any]:
        """Score ``model``; every rank must call it.

        The model runs in eval mode and float32; the modes of its modules are restored afterwards. Results are at the
        images' original sizes.

        Args:
            model: the bare detector, on its device.
            stop: stop request of the training, read before every batch; set when a loader worker dies.

        Returns:
            the evaluator's metrics, fractions; on other ranks than 0 what it returns there.

        Raises:
            EvaluationInterruptedError: a stop is requested on any rank.
            LoaderWorkerError: a loader worker died, and there is no ``stop``.
        """
        device = next(model.parameters()).device
        self.evaluator.reset()
        try:
            self._process_all(model, device, stop)
        except LoaderWorkerError as error:
            if stop is None:
                raise
            stop.failure = str(error)
        if stop is not None and _on_any_rank(stop.requested, device):
            raise EvaluationInterruptedError
        metrics = self.evaluator.evaluate()
        if metrics:
            logger.info("%s", format_results(metrics))
        return metrics

    def _process_all(self, model: nn.Module, device: torch.device, stop: GracefulStop | None) -> None:
        options = {"to_host": True} if getattr(model, "moves_data", False) else {}
        with _eval_mode(model), torch.no_grad():
            report = _Report(self.loader)
            for batch in self.loader if stop is None else stop.batches(self.loader):
                if stop is not None and stop.requested:
                    return
                images, _ = inputs_of(batch, model, device)
                results = model(images, output_sizes=[(s["height"], s["width"]) for s in batch], **options)
                self.evaluator.process(batch, results)
                report.step(len(batch))


def evaluate(
    cfg: DictConfig, model: nn.Module | None = None, loader: Iterable[list[dict]] | None = None
) -> dict[str, Any]:
    """Score a model on the test set of a config and print a table.

    Args:
        cfg: the whole config.
        model: detector on its device; None builds the config's model and loads ``train.init_checkpoint``, as
            :func:`evaluate_only`.
        loader: test loader instead of the config's.

    Returns:
        ``{"bbox": {"AP": ..., ...}, "segm": {...}, ...}``, fractions; empty on other ranks than 0.
    """
    if model is None:
        return evaluate_only(cfg, loader=loader)
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    with RunLog(None, rank):
        return Evaluation.from_config(cfg, loader).run(model)


def evaluate_only(
    cfg: DictConfig, overrides: Iterable[str] = (), loader: Iterable[list[dict]] | None = None
) -> dict[str, Any]:
    """Build the config's model, load ``train.init_checkpoint`` and score it, on the config's device.

    Under torchrun each process evaluates a part of the images.

    Raises:
        ValueError: ``train.init_checkpoint`` is not set.
        CheckpointError: it cannot be read or does not fit.
    """
    check_config(cfg)
    if not cfg.train.init_checkpoint:
        raise ValueError("nothing to evaluate: pass the detector's weights as train.init_checkpoint=PATH")
    fabric = build_fabric(cfg.train)
    with RunLog(cfg.train.output_dir, fabric.global_rank):
        logger.info("evaluation: %s", describe(fabric))
        evaluation = Evaluation.from_config(cfg, loader)
        cfg = final_config(cfg, evaluation.dataset, override_keys(overrides))
        model = build_model(cfg, pretrained=False)
        load_model_weights(model, cfg.train.init_checkpoint)
        return evaluation.run(model.to(fabric.device))


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return flag
    votes = torch.tensor(float(flag), device=device)
    dist.all_reduce(votes)
    return votes.item() > 0


class _Report:
    """Logs the progress of an evaluation, at most every 30 seconds."""

    def __init__(self, loader: Iterable):
        length = getattr(getattr(loader, "batch_sampler", None), "__len__", None)
        self._batches = length() if length is not None else None
        self._start = self._last = time.perf_counter()
        self._done = self._images = 0

    def step(self, images: int) -> None:
        self._done += 1
        self._images += images
        now = time.perf_counter()
        if now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        each = (now - self._start) / self._done
        rest = f", {each * (self._batches - self._done):.0f} s to go" if self._batches else ""
        logger.info("evaluated %d images, %.3f s each%s", self._images, (now - self._start) / self._images, rest)
