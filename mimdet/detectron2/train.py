"""Training and evaluation of a LazyConfig by Detectron2, on GPUs or a CPU."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from ..checkpoint.read import SAFE_GLOBALS
from ..config import override_keys
from ..engine.final_config import scale_to_batch_size
from ..engine.runtime import choose_device
from .config import config_file, load_config

logger = logging.getLogger("detectron2")

_PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: Detectron2's flags, and the original MIMDet's for several machines.

    It starts ``--num-gpus`` processes on each machine.
    """
    args = parse(argv)
    try:  # report errors of the config before processes start, which read it again
        args.config_file = config_file(args.config_file)  # Detectron2 opens it too, and needs its path
        cfg = load_config(args.config_file, args.opts)
        needed = ("model", "dataloader", "train") if args.eval_only else _PARTS
        if missing := [part for part in needed if part not in cfg]:
            raise ValueError(f"config {args.config_file} lacks {', '.join(missing)}: it must have {', '.join(needed)}")
        _settle_device(cfg, override_keys(args.opts))
    except (ImportError, FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags and ``key=value`` overrides."""
    parser = default_argument_parser(epilog="Shipped configs: configs/detectron2/*.py")
    parser.prog = f"{sys.executable.rsplit('/', 1)[-1]} -m {__package__}"
    parser.add_argument("--node_rank", type=int, default=None, help="the same as --machine-rank")
    parser.add_argument("--master_addr", default="", help="with --master_port, instead of --dist-url")
    parser.add_argument("--master_port", default="")
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("--config-file is needed, as in --config-file configs/detectron2/mimdet_b_mask_rcnn.py")
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error("--num-gpus and --num-machines count from 1; without a GPU, 1 runs on the CPU")
    if torch.cuda.is_available() and args.num_gpus > torch.cuda.device_count():
        parser.error(f"--num-gpus {args.num_gpus}, but PyTorch sees {torch.cuda.device_count()}")
    if bool(args.master_addr) != bool(args.master_port):
        parser.error("--master_addr and --master_port belong together: give both")
    if args.master_addr:
        args.dist_url = f"tcp://{args.master_addr}:{args.master_port}"
    if args.node_rank is not None:
        args.machine_rank = args.node_rank
    return args


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``args.eval_only`` evaluate and return the results, in this process."""
    cfg = load_config(args.config_file, args.opts)
    user_keys = override_keys(args.opts)
    lines = [_settle_device(cfg, user_keys)]
    if not args.eval_only and cfg.train.get("reference_batch_size"):
        lines += scale_to_batch_size(cfg, user_keys)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="mimdet")
    for line in lines:
        logger.info("%s", line)
    model = instantiate(cfg.model).to(cfg.train.device)
    # weights_only: checkpoints hold numpy scalars and argparse.Namespace, which torch must be told to accept.
    with torch.serialization.safe_globals(SAFE_GLOBALS):
        if args.eval_only:
            model = _distributed(model, cfg)
            DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
            return evaluate(cfg, model)
        train(cfg, model, args.resume)
    return None


def train(cfg: DictConfig, model: nn.Module, resume: bool) -> None:
    """Detectron2's loop over ``cfg.train.max_iter`` iterations, with evaluations and checkpoints."""
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    model = _distributed(model, cfg)
    trainer = (AMPTrainer if cfg.train.amp.enabled else SimpleTrainer)(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    main_process = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main_process else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: evaluate(cfg, model)),
            hooks.PeriodicWriter(default_writers(cfg.train.output_dir, cfg.train.max_iter), period=cfg.train.log_period)
            if main_process
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    trainer.train(start, cfg.train.max_iter)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any] | None:
    """Results of ``cfg.dataloader.evaluator`` over the test set; None without one."""
    if "evaluator" not in cfg.dataloader:
        return None
    results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
    print_csv_format(results)
    return results


def _settle_device(cfg: DictConfig, user_keys: Collection[str]) -> str:
    """Fit ``train.device`` and mixed precision to the machine, in place; returns a line for the log.

    The original's configs have "cuda": without a GPU that becomes the CPU, unless an override set it.
    """
    name = cfg.train.get("device") or "auto"
    if name.startswith("cuda") and not torch.cuda.is_available() and "train.device" not in user_keys:
        name = "auto"
    device = choose_device(name)
    # Without an index each process uses its current GPU, which Detectron2 has set.
    cfg.train.device = name if ":" in name else device.type
    line = f"device {cfg.train.device}"
    if cfg.train.amp.enabled and device.type != "cuda":
        cfg.train.amp.enabled = False
        line += ", without the mixed precision that Detectron2 has on GPUs only"
    return line


def _distributed(model: nn.Module, cfg: DictConfig) -> nn.Module:
    options = dict(cfg.train.get("ddp") or {})
    if cfg.train.device == "cpu":
        options["device_ids"] = None
    return create_ddp_model(model, **options)
