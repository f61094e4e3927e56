"""A detector, dataset and evaluator small enough to train in milliseconds, and a config that names them."""

from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from omegaconf import DictConfig
from torch import nn

from mimdet.config import LazyCall
from mimdet.data import build_detection_test_loader, build_detection_train_loader
from mimdet.engine import MultiStepParamScheduler, WarmupParamScheduler, get_fpn_model_parameters
from mimdet.evaluation.coco_evaluator import gather

LOSSES = ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg", "loss_mask")


class FakeDataset:
    """Records of random images; every image has one box."""

    def __init__(self, size=16, classes=("cat", "dog")):
        self.classes = list(classes)
        self.category_ids = [10 * (label + 1) for label in range(len(classes))]
        self.sizes = np.tile([8, 10], (size, 1))

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        return {"image_id": 100 + index, "file_name": f"image_{index}.jpg", "height": 8, "width": 10}


def fake_mapper(record, rng):
    image = torch.from_numpy(rng.integers(0, 256, (3, 8, 10), dtype=np.uint8))
    boxes = torch.tensor([[0.0, 1.0, 1333.5, 7.0]])
    targets = {"boxes": boxes, "labels": torch.zeros(1, dtype=torch.int64), "masks": [[np.array([0.0, 1, 2, 3, 4, 5])]]}
    return {"image": image, **record, "targets": targets}


def drawing_loader(**options):
    """The project's loader, by a user who draws a global random number when it starts."""
    torch.rand(1)
    yield from build_detection_train_loader(**options)


def short_loader(**options):
    """Three batches."""
    return islice(build_detection_train_loader(**options), 3)


class FakeHeads(nn.Module):
    def __init__(self, num_classes=80):
        super().__init__()
        self.num_classes = num_classes
        self.predictor = nn.Linear(4, num_classes)


class FakeDetector(nn.Module):
    """Draws random numbers in training, as token sampling does, and even in eval mode; has running statistics.

    `seen` holds the last call's arguments; `nan_from` is the call, counted from 0, from which one loss is NaN.
    """

    def __init__(self, roi_heads, nan_from=None, pretrained=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU())
        self.roi_heads = roi_heads
        self.nan_from = nan_from
        self.pretrained = pretrained
        self.calls = 0
        self.seen = None

    def forward(self, images, targets=None, output_sizes=None):
        self.seen = (images, targets, output_sizes)
        x = self.stem(torch.stack([image.float() / 255 for image in images]))
        keep = torch.rand(x.shape, device=x.device) > 0.5
        scores = self.roi_heads.predictor((x * keep).mean((2, 3)))
        if not self.training:
            return [{"scores": row.max()[None]} for row in scores]
        loss = nn.functional.cross_entropy(scores, torch.cat([target["labels"] for target in targets]))
        losses = {name: loss * (index + 1) for index, name in enumerate(LOSSES)}
        if self.nan_from is not None and self.calls >= self.nan_from:
            losses["loss_mask"] = losses["loss_mask"] * float("nan")
        self.calls += 1
        return losses


class FakeEvaluator:
    """Counts images and draws random numbers; `log` collects the number of images of each evaluation."""

    log: ClassVar[list[int]] = []

    def __init__(self, dataset=None):
        self.dataset = dataset

    def reset(self):
        self.scores = {}

    def process(self, samples, results):
        for sample, result in zip(samples, results, strict=True):
            self.scores[sample["image_id"]] = float(result["scores"])

    def evaluate(self):
        np.random.rand()
        torch.rand(1)
        gathered = gather(self.scores)
        if gathered is None:
            return {}
        scores = {k: v for part in gathered for k, v in part.items()}
        FakeEvaluator.log.append(len(scores))
        mean = sum(scores[k] for k in sorted(scores)) / len(scores)
        figures = dict.fromkeys(("AP50", "AP75", "APs", "APm", "APl"), float("nan"))
        return {"bbox": {"AP": mean, **figures}, "bbox_per_class": {"cat": mean, "dog": 0.0}}


def fake_config(output_dir, max_iter=6, batch_size=2) -> DictConfig:
    """A whole config in the shape of the project's own."""
    content = {
        "model": LazyCall(FakeDetector)(
            roi_heads=LazyCall(FakeHeads)(num_classes=80), nan_from=None, pretrained="${mae_checkpoint.path}"
        ),
        "mae_checkpoint": {"path": None},
        "dataloader": {
            "train": LazyCall(build_detection_train_loader)(
                dataset=LazyCall(FakeDataset)(),
                mapper=fake_mapper,
                total_batch_size=batch_size,
                num_workers=0,
                seed="${train.seed}",
            ),
            "test": LazyCall(build_detection_test_loader)(
                dataset=LazyCall(FakeDataset)(size=5), mapper=fake_mapper, batch_size=2, num_workers=0
            ),
            "evaluator": LazyCall(FakeEvaluator)(),
        },
        "optimizer": LazyCall(torch.optim.AdamW)(
            params=LazyCall(get_fpn_model_parameters)(weight_decay=0.1, base_lr="${..lr}", multiplier=2.0),
            lr=0.01,
            betas=(0.9, 0.999),
            weight_decay=0.1,
        ),
        "lr_multiplier": LazyCall(WarmupParamScheduler)(
            scheduler=LazyCall(MultiStepParamScheduler)(values=[1, 0.1], milestones=[75], num_updates=100),
            warmup_length=0.25,
            warmup_factor=0.0,
        ),
        "train": {
            "output_dir": str(output_dir),
            "init_checkpoint": "",
            "init_checkpoint_ignore": [],
            "max_iter": max_iter,
            "reference_batch_size": batch_size,
            "seed": 3,
            "device": "cpu",
            "amp": {"enabled": True, "dtype": "auto"},
            "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": True},
            "checkpointer": {"period": 3, "max_to_keep": 100},
            "eval_period": 2,
            "log_period": 1,
            "clip_grad_norm": None,
        },
    }
    return DictConfig(content, flags={"allow_objects": True})
