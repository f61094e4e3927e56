"""``mimdet train`` and ``mimdet eval``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[
    str,
    typer.Option(
        help="Python config, of Detectron2 too, or a config.yaml that a run saved. Shipped ones are found by name."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Config overrides, e.g. `train.max_iter=1000`.", show_default=False),
]
NumGpus = Annotated[
    int | None, typer.Option(min=1, help="Processes on this machine; more than 1 are started with torchrun.")
]
TrainJson = Annotated[Path | None, typer.Option(help="COCO annotations to train on, instead of the config's.")]
TrainImages = Annotated[Path | None, typer.Option(help="Folder of the training images.")]
ValJson = Annotated[Path | None, typer.Option(help="COCO annotations to evaluate on, instead of the config's.")]
ValImages = Annotated[Path | None, typer.Option(help="Folder of the evaluation images.")]


def train(
    config_file: ConfigFile,
    opts: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the output.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete an earlier run's checkpoints and metrics in the output.")
    ] = False,
    eval_only: Annotated[bool, typer.Option("--eval-only", help="Only evaluate `train.init_checkpoint`.")] = False,
    num_gpus: NumGpus = None,
    train_json: TrainJson = None,
    train_images: TrainImages = None,
    val_json: ValJson = None,
    val_images: ValImages = None,
) -> None:
    """Train a detector, with evaluations and checkpoints.

    **COCO with MAE weights:**
    `mimdet train --config-file configs/mimdet_b_mask_rcnn.py mae_checkpoint.path=mae_pretrain_vit_base_full.pth`

    **Your data:** add `--train-json a.json --train-images a/ --val-json b.json --val-images b/`; the classes
    are those of the file.

    **Another batch size:** `dataloader.train.total_batch_size=16` scales learning rate and schedule with it.

    **Stopped?** Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 finish the step and save; the same command with `--resume`
    continues. Several machines: start this under `torchrun`.
    """
    launch_distributed(num_gpus)
    overrides = [
        *data_overrides("train", train_json, train_images),
        *data_overrides("test", val_json, val_images),
        *(opts or []),
    ]
    from .. import engine
    from ..config import load

    cfg = load(config_file, overrides)
    if eval_only:
        engine.evaluate_only(cfg, overrides)
    else:
        engine.train(cfg, resume=resume, overrides=overrides, overwrite=overwrite)


def evaluate(
    config_file: ConfigFile,
    opts: Overrides = None,
    num_gpus: NumGpus = None,
    val_json: ValJson = None,
    val_images: ValImages = None,
) -> None:
    """Evaluate a detector's weights with COCO's metrics; the same as `train --eval-only`.

    `mimdet eval --config-file configs/mimdet_b_mask_rcnn.py train.init_checkpoint=model_final.pth`

    The encoder sees all tokens unless `model.backbone.bottom_up.inference_sample_ratio` says otherwise.
    """
    train(config_file, opts, eval_only=True, num_gpus=num_gpus, val_json=val_json, val_images=val_images)


def data_overrides(split: str, json_file: Path | None, image_root: Path | None) -> list[str]:
    """Config overrides for a split's annotation file and image folder; ValueError for one without the other."""
    if (json_file is None) != (image_root is None):
        name = "train" if split == "train" else "val"
        raise ValueError(f"--{name}-json and --{name}-images belong together: give both")
    if json_file is None:
        return []
    key = f"dataloader.{split}.dataset"
    return [
        f"{key}.names=null",
        *(
            f"{key}.{name}={json.dumps(str(path))}"
            for name, path in (("json_file", json_file), ("image_root", image_root))
        ),
    ]


def launch_distributed(num_gpus: int | None) -> None:
    """Run this command again in ``num_gpus`` processes under torchrun, then exit; no effect in such a process."""
    if num_gpus in (None, 1) or "WORLD_SIZE" in os.environ:
        return
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    from ..data.loader import stop_signals

    # torchrun: seconds from a signal to SIGKILL. The step and checkpoint of a large model exceed the default 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
    names = ",".join(signum.name for signum in stop_signals())
    options = ["--standalone", "--nproc-per-node", str(num_gpus), "--signals-to-handle", names]
    try:
        torchrun([*options, "-m", "mimdet", *sys.argv[1:]])
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:  # the process has printed its error, unless it was killed
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        raise RuntimeError(f"process {rank} (pid {failure.pid}) was ended by {failure.signal_name()}") from None
    sys.exit(0)
