"""The training of a detector, from a config to its final metrics."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning_fabric import Fabric
from omegaconf import DictConfig

from ..checkpoint.read import state_dict_of
from ..config import check_config, instantiate, override_keys, to_yaml
from ..data.loader import LoaderWorkerError
from ..files import write_bytes
from .checkpoint import Checkpointer
from .evaluate import Evaluation, EvaluationInterruptedError
from .final_config import final_config
from .lock import locked
from .logger import MetricsWriter, RunLog, TrainingProgress, delete_metrics, flatten
from .model import build_model
from .optim import build_optimizer
from .resume import check_resumable, isolated_random, pack, restore, restore_random, seed_all, warn_of_changes
from .runtime import build_fabric, describe
from .signals import GracefulStop, TrainingInterrupted
from .step import NonFiniteLossError, StepReport, TrainStep
from .warm_up import compile_kernels
from .weights import load_model_weights, load_state

logger = logging.getLogger(__name__)

# Steps whose losses are not read yet, by type of device: the host prepares the next ones meanwhile.
_UNREAD_STEPS = {"cuda": 2}


@dataclass
class _Unread:
    """A step whose losses are not read yet."""

    iteration: int
    report: StepReport
    lr: float
    data_seconds: float
    seconds: float = 0.0


def train(
    cfg: DictConfig,
    resume: bool | Literal["auto"] = False,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    after_evaluation: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train the detector of a config, with periodic and final evaluations and checkpoints.

    Runs on one CPU or GPU, or in several processes under torchrun. ``cfg`` is not changed. ``train.output_dir``
    receives ``config.yaml``, checkpoints, ``log.txt``, ``metrics.jsonl`` and TensorBoard's files; an error before the
    training leaves it unchanged.

    Args:
        cfg: the whole config, overrides applied.
        resume: start from the last checkpoint in ``train.output_dir``. If there is none, start from the beginning,
            with a warning unless ``resume`` is "auto".
        overrides: the applied ``key=value`` strings; their keys are not changed to fit the batch size or the data.
        overwrite: delete the checkpoints and metrics of an earlier run in ``train.output_dir``.
        after_evaluation: called on rank 0 after each evaluation, when ``metrics.jsonl`` and the evaluator's files are
            written.

    Returns:
        metrics of the final evaluation, on rank 0; empty without ``dataloader.evaluator``.

    Raises:
        TrainingInterrupted: SIGINT, SIGTERM, SIGHUP or SIGUSR1; a checkpoint was saved.
        LoaderWorkerError: a loader worker died; a checkpoint was saved.
        NonFiniteLossError: a loss or a weight became NaN or infinite.
        KernelCompilationError: a Triton kernel does not compile.
        CheckpointError: a checkpoint cannot be written or read, or does not fit.
        FileExistsError: the folder holds an earlier run, and neither ``resume`` nor ``overwrite`` is given.
        FolderInUseError: another process trains in the folder.
        ValueError: both ``resume`` and ``overwrite``, or a mistake in the config.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with the run that --overwrite deletes: give only one of them")
    check_config(cfg)
    fabric = build_fabric(cfg.train)
    with RunLog(cfg.train.output_dir, fabric.global_rank, deferred=True) as log, contextlib.ExitStack() as stack:
        logger.info("training: %s", describe(fabric))
        dataset = instantiate(cfg.dataloader.train.dataset)
        cfg = final_config(cfg, dataset, override_keys(overrides), training=True)
        training = _Training(cfg, dataset, fabric, resume, overwrite, after_evaluation)
        _on_rank_0(fabric, lambda: training.open_folder(log, stack))
        with GracefulStop() as stop:  # earlier there is nothing to save: Ctrl-C aborts
            return training.run(log, stop)


class _Training:
    def __init__(
        self,
        cfg: DictConfig,
        dataset: Any,
        fabric: Fabric,
        resume: bool | str,
        overwrite: bool,
        after_evaluation: Callable[[], None] | None,
    ):
        self.cfg = cfg
        self.dataset = dataset
        self.fabric = fabric
        self.resume = resume
        self.overwrite = overwrite
        self.after_evaluation = after_evaluation
        self.seed = cfg.train.seed + fabric.global_rank
        self.checkpointer = Checkpointer(cfg.train.output_dir, cfg.train.checkpointer.get("max_to_keep"))
        self.saved: tuple[int, Path] | None = None  # last saved iteration and its file
        self.evaluation = self._build_evaluation()
        self.meta = {
            "classes": list(self.dataset.classes),
            "category_ids": list(self.dataset.category_ids),
            "config": self._config_text(),
        }

        seed_all(self.seed)
        source, checkpoint = self._find_checkpoint()
        if checkpoint is not None:
            check_resumable(checkpoint, self.dataset.classes, str(source))
            warn_of_changes(checkpoint, cfg)
        self.model = build_model(cfg, pretrained=checkpoint is None)
        if checkpoint is not None:
            load_state(self.model, state_dict_of(checkpoint, source), source)
        elif cfg.train.init_checkpoint:
            load_model_weights(self.model, cfg.train.init_checkpoint, cfg.train.get("init_checkpoint_ignore") or ())
        scaled = bool(fabric.strategy.precision.state_dict())  # of GradScaler
        self.optimizer = build_optimizer(cfg.optimizer, self.model, scaled)
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

    def open_folder(self, log: RunLog, stack: contextlib.ExitStack) -> None:
        """Lock the folder and write to it, on rank 0, after all checks."""
        folder = self.checkpointer.directory
        stack.enter_context(locked(folder))
        if not self.resume:
            self._refuse_to_lose_checkpoints()  # again: another process may have written since
        log.open_file()
        if self.overwrite:
            deleted = [*self.checkpointer.delete_all(), *delete_metrics(folder)]
            if deleted:
                logger.warning("--overwrite: deleted the earlier run in %s: %s", folder, ", ".join(deleted))
        if self.meta["config"]:
            write_bytes(folder / "config.yaml", self.meta["config"].encode())

    def run(self, log: RunLog, stop: GracefulStop) -> dict[str, Any]:
        cfg = self.cfg.train
        self.stop = stop
        self.batches = iter(())
        if self.start < cfg.max_iter:
            self.batches = self._batches(self.start)
            first = next(self.batches)
            compile_kernels(self.cfg, first, self.fabric, self.evaluation is not None, log.console)
            self.batches = itertools.chain([first], self.batches)
        if self.random is not None:
            restore_random(self.random, self.fabric, self.seed + self.start)
        self.step.model.train()
        writer = MetricsWriter(self.checkpointer.directory, self.start) if self.fabric.is_global_zero else None
        batch_size = self.cfg.dataloader.train.total_batch_size
        progress = TrainingProgress(cfg.max_iter, self.start, batch_size, cfg.log_period, log.console)
        self.unread: collections.deque[_Unread] = collections.deque()
        self.most_unread = _UNREAD_STEPS.get(self.fabric.device.type, 0)
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
        batch = self._next_batch(iteration)
        data_seconds = time.perf_counter() - begin
        lr = self._set_lr(iteration)
        step = _Unread(iteration, self.step(batch, lambda: self.stop.requested), lr, data_seconds)
        self.unread.append(step)
        last = iteration + 1 == cfg.max_iter
        save = last or _every(cfg.checkpointer.period, iteration)
        evaluate = not last and _every(cfg.eval_period, iteration)
        # Processes stop together, at a step whose requests all of them have read.
        at_once = save or evaluate or (self.stop.requested and self.fabric.world_size == 1)
        finished, stop = self._read(0 if at_once else self.most_unread)
        step.seconds = time.perf_counter() - begin
        if writer is not None:
            self._report(finished, progress, writer)
        if save or stop:
            self._save(iteration)
        if stop:
            self._interrupt()
        if evaluate:
            self._evaluate(iteration, writer)

    def _read(self, leave: int) -> tuple[list[tuple[_Unread, dict[str, float]]], bool]:
        """Losses of all but the newest ``leave`` steps, and whether a process has requested to stop: then of all."""
        finished, stop = [], False
        while len(self.unread) > (0 if stop else leave):
            step = self.unread.popleft()
            try:
                losses, requested = step.report.read(step.iteration)
            except NonFiniteLossError as error:
                raise self._diverged(f"{error}. Look at these images and their annotations") from None
            finished.append((step, losses))
            stop |= requested
        return finished, stop

    @staticmethod
    def _report(
        finished: Sequence[tuple[_Unread, dict[str, float]]], progress: TrainingProgress, writer: MetricsWriter
    ) -> None:
        for step, losses in finished:
            losses = {"total_loss": sum(losses.values()), **losses}
            progress.step(step.iteration, losses, step.lr, step.seconds, step.data_seconds)
            if progress.due(step.iteration):
                seconds = {"time": step.seconds, "data_time": step.data_seconds}
                writer.write(step.iteration, {**losses, "lr": step.lr, **seconds})

    def _next_batch(self, iteration: int) -> list[dict]:
        try:
            batch = next(self.batches, None)
        except LoaderWorkerError as error:
            self.stop.failure = str(error)
        else:
            if batch is None:
                raise RuntimeError(f"dataloader.train ended before iteration {iteration}: the loader must be endless")
            return batch
        # DDP needs this rank's gradients until all ranks have read its request to stop.
        logger.warning("%s. Going on without workers until all is saved", self.stop.failure)
        with isolated_random():
            self.batches = self._batches(iteration, num_workers=0)
            return next(self.batches)

    def _diverged(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(
            f"{what}. Last good checkpoint: {self.checkpointer.latest() or 'none'}. Resuming with a lower "
            "optimizer.lr, train.clip_grad_norm=1.0 or train.amp.enabled=false may help"
        )

    def _set_lr(self, iteration: int) -> float:
        """Set every group's learning rate; returns the one of ``optimizer.lr``."""
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
                metrics = self.evaluation.run(self.model, self.stop)
        except EvaluationInterruptedError:
            logger.warning("evaluation after %d iterations given up", iteration + 1)
            if self.saved is None or self.saved[0] != iteration:
                self._save(iteration)
            self._interrupt()
        if writer is not None and metrics:
            writer.write(iteration, flatten(metrics))
            if self.after_evaluation is not None:
                self.after_evaluation()
        return metrics

    def _save(self, iteration: int) -> None:
        broken = [name for name, value in self.model.named_parameters() if not value.isfinite().all()]
        if broken:  # an overflowing gradient: the loss shows it only in the next step
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
        self.fabric.barrier()  # torchrun kills rank 0, which may be writing, when another rank exits
        iteration, path = self.saved
        how = "run the same command again" if self.resume else "run the same command with --resume"
        done = f"{iteration + 1} of {self.cfg.train.max_iter} iterations"
        text = f"stopped after {done}, saved in {path}. To go on, {how}"
        if self.stop.failure is not None and self.stop.signum is None:
            raise LoaderWorkerError(f"{self.stop.failure}. The training {text}")
        logger.warning("%s", text)
        raise TrainingInterrupted(self.stop.signum or signal.SIGTERM, path)

    def _find_checkpoint(self) -> tuple[Path | None, dict[str, Any] | None]:
        """Path and content of the checkpoint to resume from; (None, None) to start from the beginning."""
        if not self.resume:
            _on_rank_0(self.fabric, self._refuse_to_lose_checkpoints)
            return None, None
        # Network file systems: another rank may not see the last save yet, so rank 0 decides.
        content = None

        def find() -> Path | None:
            nonlocal content
            path, content = self.checkpointer.newest() or (None, None)
            return path

        path = _on_rank_0(self.fabric, find)
        if path is None:
            level = logging.INFO if self.resume == "auto" else logging.WARNING
            folder = self.checkpointer.directory
            logger.log(level, "nothing to resume: no checkpoint in %s. Starting from the beginning", folder)
            return None, None
        logger.info("resuming from %s", path)
        return path, content if content is not None else self.checkpointer.load(path)

    def _refuse_to_lose_checkpoints(self) -> None:
        latest, start = self.checkpointer.latest(), self.cfg.train.init_checkpoint
        if self.overwrite:
            if start and any(Path(start).expanduser().resolve() == path.resolve() for path in self.checkpointer.all()):
                raise ValueError(f"--overwrite would delete train.init_checkpoint={start}: move it to another folder")
        elif latest is not None:
            raise FileExistsError(
                f"{self.checkpointer.directory} holds an earlier run ({latest.name}): --resume goes on with it, "
                "--overwrite deletes its checkpoints and metrics, another train.output_dir keeps it"
            )

    def _build_evaluation(self) -> Evaluation | None:
        """Build the evaluation before training, to report errors in the test data at once."""
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

    def _config_text(self) -> str:
        try:
            return to_yaml(self.cfg)
        except ValueError as error:
            logger.warning("config.yaml is not written: %s", error)
            return ""

    def _batches(self, start: int, **options: Any) -> Iterator[list[dict]]:
        loader = instantiate(self.cfg.dataloader.train, dataset=self.dataset, start_batch=start, **options)
        # DataLoader may draw random numbers when it starts: fetch a batch before random states are restored.
        batches = self.stop.batches(loader)
        return itertools.chain([next(batches)], batches)


def _on_rank_0(fabric: Fabric, action: Callable[[], Any]) -> Any:
    """The result of ``action`` on rank 0, on all ranks; its error is raised on all, so that no rank hangs."""
    result: Any = None
    if fabric.is_global_zero:
        try:
            result = action()
        except Exception as error:
            result = error
    if fabric.world_size > 1:
        result = fabric.broadcast(result)
    if isinstance(result, Exception):
        raise result
    return result


def _every(period: int | None, iteration: int) -> bool:
    return bool(period) and (iteration + 1) % period == 0
