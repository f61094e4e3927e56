"""The training of a detector, from a config to its final metrics."""

from __future__ import annotations

import copy
import itertools
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_fabric import Fabric
from omegaconf import DictConfig

from ..checkpoint.read import state_dict_of
from ..config import check_config, instantiate, to_yaml
from ..files import write_atomically
from .checkpoint import Checkpointer
from .evaluate import Evaluation, EvaluationInterruptedError
from .logger import RunLog
from .metrics import MetricsWriter, flatten
from .model import build_model, match_num_classes
from .progress import TrainingProgress
from .random_state import isolated_random, seed_all
from .resume import check_resumable, pack, restore, restore_random
from .runtime import build_fabric, describe
from .schedule import scale_to_batch_size
from .signals import GracefulStop, TrainingInterrupted
from .step import NonFiniteLossError, TrainStep, read_losses
from .weights import load_model_weights, load_state

logger = logging.getLogger(__name__)


def train(cfg: DictConfig, resume: bool = False, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Train the detector that a config describes, evaluating and saving on the way and at the end.

    Runs on one CPU or GPU as it is, on several processes under torchrun. The config is not changed; its
    ``train.output_dir`` receives ``config.yaml``, checkpoints, ``log.txt``, ``metrics.jsonl`` and TensorBoard's
    files.

    Args:
        cfg: the whole config, overrides applied.
        resume: go on from the last checkpoint in ``train.output_dir``; from the start if there is none.
        overrides: the ``key=value`` strings that were applied; their keys are not derived from the batch size
            or from the data.

    Returns:
        metrics of the final evaluation, on rank 0; empty without ``dataloader.evaluator``.

    Raises:
        TrainingInterrupted: SIGINT or SIGTERM; a checkpoint was saved.
        NonFiniteLossError: a loss or a weight became NaN or infinite.
        CheckpointError: a checkpoint cannot be written, read or fitted.
    """
    check_config(cfg)
    cfg = copy.deepcopy(cfg)
    fabric = build_fabric(cfg.train)
    with RunLog(cfg.train.output_dir, fabric.global_rank) as log:
        logger.info("training: %s", describe(fabric))
        for line in scale_to_batch_size(cfg, overrides):
            logger.info("%s", line)
        training = _Training(cfg, fabric, log, resume, overrides)
        with GracefulStop() as stop:  # before this there is nothing to save: Ctrl-C aborts
            return training.run(stop)


class _Training:
    def __init__(
        self,
        cfg: DictConfig,
        fabric: Fabric,
        log: RunLog,
        resume: bool,
        overrides: Sequence[str],
    ):
        self.cfg = cfg
        self.fabric = fabric
        self.log = log
        self.seed = cfg.train.seed + fabric.global_rank
        self.checkpointer = Checkpointer(cfg.train.output_dir, cfg.train.checkpointer.get("max_to_keep"))
        self.saved: tuple[int, Path] | None = None  # last finished iteration that is on disk, and where
        self.dataset = instantiate(cfg.dataloader.train.dataset)
        match_num_classes(cfg, self.dataset, overrides)
        self.evaluation = self._build_evaluation()
        self.meta = {
            "classes": list(self.dataset.classes),
            "category_ids": list(self.dataset.category_ids),
            "config": self._save_config(),
        }

        seed_all(self.seed)
        source = self._find_checkpoint(resume)
        checkpoint = None
        if source is not None:
            checkpoint = self.checkpointer.load(source)
            check_resumable(checkpoint, self.dataset.classes, str(source))
        self.model = build_model(cfg, pretrained=checkpoint is None)
        if checkpoint is not None:
            load_state(self.model, state_dict_of(checkpoint, source), source)
        elif cfg.train.init_checkpoint:
            load_model_weights(self.model, cfg.train.init_checkpoint, cfg.train.get("init_checkpoint_ignore") or ())
        params = instantiate(cfg.optimizer.params, model=self.model)
        self.optimizer = instantiate(cfg.optimizer, params=params)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.lr_multiplier = instantiate(cfg.lr_multiplier)
        wrapped_model, wrapped_optimizer = fabric.setup(self.model, self.optimizer)
        self.step = TrainStep(fabric, wrapped_model, wrapped_optimizer, cfg.train.get("clip_grad_norm"))

        self.start = 0
        self.random = None
        if checkpoint is not None:
            self.start = restore(checkpoint, fabric, self.optimizer, str(source))
            self.random = checkpoint["random"]
            self.saved = (self.start - 1, source)

    def run(self, stop: GracefulStop) -> dict[str, Any]:
        cfg = self.cfg.train
        self.stop = stop
        self.batches = self._batches() if self.start < cfg.max_iter else iter(())
        if self.random is not None:
            restore_random(self.random, self.fabric, self.seed + self.start)
        self.step.model.train()
        writer = MetricsWriter(self.log.output_dir, self.start) if self.fabric.is_global_zero else None
        batch_size = self.cfg.dataloader.train.total_batch_size
        progress = TrainingProgress(cfg.max_iter, self.start, batch_size, cfg.log_period, self.log.console)
        try:
            for iteration in range(self.start, cfg.max_iter):
                self._iterate(iteration, progress, writer)
            progress.close()
            return self._evaluate(max(cfg.max_iter, self.start) - 1, writer)
        finally:
            progress.close()
            if writer is not None:
                writer.close()

    def _iterate(self, iteration: int, progress: TrainingProgress, writer: MetricsWriter | None) -> None:
        cfg = self.cfg.train
        begin = time.perf_counter()
        batch = next(self.batches, None)
        if batch is None:
            raise RuntimeError(f"dataloader.train ended before iteration {iteration}: the loader must be endless")
        data_seconds = time.perf_counter() - begin
        lr = self._set_lr(iteration)
        losses, stop = self._train_on(batch, iteration)
        seconds = time.perf_counter() - begin
        if writer is not None:
            losses = {"total_loss": sum(losses.values()), **losses}
            progress.step(iteration, losses, lr, seconds, data_seconds)
            if progress.due(iteration):
                writer.write(iteration, {**losses, "lr": lr, "time": seconds, "data_time": data_seconds})

        last = iteration + 1 == cfg.max_iter
        if last or stop or _every(cfg.checkpointer.period, iteration):
            self._save(iteration)
        if stop:
            self._interrupt()
        if not last and _every(cfg.eval_period, iteration):
            self._evaluate(iteration, writer)

    def _train_on(self, batch: list[dict], iteration: int) -> tuple[dict[str, float], bool]:
        try:
            return read_losses(self.fabric, self.step(batch), self.stop.requested, batch, iteration)
        except NonFiniteLossError as error:
            raise self._diverged(f"{error}. Look at these images and their annotations") from None

    def _diverged(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what}. Last good checkpoint: {self.checkpointer.latest() or 'none'}. Resuming with a lower "
            "optimizer.lr, train.clip_grad_norm=1.0 or train.amp.enabled=false may help"
        )

    def _set_lr(self, iteration: int) -> float:
        """Set every group's learning rate; returns what ``optimizer.lr`` has become."""
        multiplier = self.lr_multiplier(iteration / self.cfg.train.max_iter)
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * multiplier
        return self.optimizer.defaults["lr"] * multiplier

    def _evaluate(self, iteration: int, writer: MetricsWriter | None) -> dict[str, Any]:
        if self.evaluation is None:
            return {}
        logger.info("evaluating after %d iterations", iteration + 1)
        try:
            with isolated_random():
                metrics = self.evaluation.run(self.model, lambda: self.stop.requested)
        except EvaluationInterruptedError:
            logger.warning("evaluation after %d iterations given up", iteration + 1)
            if self.saved is None or self.saved[0] != iteration:
                self._save(iteration)
            self._interrupt()
        if writer is not None and metrics:
            writer.write(iteration, flatten(metrics))
        return metrics

    def _save(self, iteration: int) -> None:
        broken = [name for name, value in self.model.named_parameters() if not value.isfinite().all()]
        if broken:  # by an overflowing gradient: the loss would show it only in the next step
            raise self._diverged(f"iteration {iteration}: weights became NaN or infinite ({', '.join(broken[:3])})")
        state = pack(self.fabric, self.model, self.optimizer, iteration, self.meta)
        last = iteration + 1 == self.cfg.train.max_iter
        name = "model_final" if last else f"model_{iteration:07d}"
        path = self.checkpointer.directory / f"{name}.pth"
        if self.fabric.is_global_zero:
            self.checkpointer.save(name, state)
            logger.info("saved %s", path)
        self.saved = (iteration, path)

    def _interrupt(self) -> NoReturn:
        self.fabric.barrier()  # a rank that exits while rank 0 is still writing would have it killed
        iteration, path = self.saved
        logger.warning(
            "stopped after %d of %d iterations, saved in %s. To go on, run the same command with --resume",
            iteration + 1,
            self.cfg.train.max_iter,
            path,
        )
        raise TrainingInterrupted(self.stop.signum or signal.SIGTERM, path)

    def _find_checkpoint(self, resume: bool) -> Path | None:
        # rank 0 decides for all: on another rank the folder may not show its last save yet
        latest = self.fabric.broadcast(self.checkpointer.latest() if self.fabric.is_global_zero else None)
        if resume and latest is None:
            logger.info("nothing to resume in %s: starting from the beginning", self.checkpointer.directory)
        elif resume:
            logger.info("resuming from %s", latest)
        elif latest is not None:
            logger.warning("%s is of an earlier run, whose checkpoints will be replaced; --resume goes on", latest)
        return latest if resume else None

    def _build_evaluation(self) -> Evaluation | None:
        """Built before training, so that a mistake in the test data shows at once."""
        if not (self.cfg.dataloader.get("test") and self.cfg.dataloader.get("evaluator")):
            logger.info("no dataloader.test or dataloader.evaluator: training without evaluation")
            return None
        evaluation = Evaluation.from_config(self.cfg)
        trained, tested = list(self.dataset.classes), list(evaluation.dataset.classes)
        if trained != tested:
            raise ValueError(
                f"the training set has {len(trained)} classes ({', '.join(trained[:5])}), the test set {len(tested)} "
                f"({', '.join(tested[:5])}): they must be the same, in the same order"
            )
        return evaluation

    def _save_config(self) -> str:
        try:
            text = to_yaml(self.cfg)
        except ValueError as error:
            logger.warning("config.yaml is not written: %s", error)
            return ""
        if self.fabric.is_global_zero:
            write_atomically(self.log.output_dir / "config.yaml", lambda file: file.write(text.encode()))
        return text

    def _batches(self) -> Iterator[list[dict]]:
        loader = instantiate(self.cfg.dataloader.train, dataset=self.dataset, start_batch=self.start)
        # Fetched before random states are restored: loaders may draw numbers when they start.
        batches = iter(loader)
        return itertools.chain([next(batches)], batches)


def _every(period: int | None, iteration: int) -> bool:
    return bool(period) and (iteration + 1) % period == 0
