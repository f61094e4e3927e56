"""The config parts that ``detectron2.model_zoo.get_config`` returns by name, without Detectron2's files.

Detectors are built from the shipped ones. A target that has no native counterpart is its dotted name, which the
conversion reports unless the config replaces it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig

from .lazy import LazyCall as L

_RGB_MEAN, _RGB_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
_DATA = "detectron2.data"
_BACKBONES = "detectron2.modeling.backbone"


def _config(**sections: Any) -> DictConfig:
    return DictConfig(sections, flags={"allow_objects": True})


def _train() -> DictConfig:
    return _config(
        train=_config(
            output_dir="./output",
            init_checkpoint="",
            max_iter=90_000,
            amp={"enabled": False},
            ddp={"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
            checkpointer={"period": 5000, "max_to_keep": 100},
            eval_period=5000,
            log_period=20,
            device="cuda",
        )
    )


def _optim() -> DictConfig:
    import torch

    params = "detectron2.solver.build.get_default_optimizer_params"
    return _config(
        SGD=L(torch.optim.SGD)(params=L(params)(weight_decay_norm=0.0), lr=0.02, momentum=0.9, weight_decay=1e-4),
        AdamW=L(torch.optim.AdamW)(
            params=L(params)(base_lr="${..lr}", weight_decay_norm=0.0), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1
        ),
    )


def _schedules() -> DictConfig:
    return _config(**{f"lr_multiplier_{n}x": _schedule(n) for n in (1, 2, 3, 6, 9)})


def _schedule(times: int) -> DictConfig:
    """``times`` times 90,000 iterations of 16 images; up to 2, the milestones are those of 1."""
    total = 90_000 * times
    milestones = [60_000, 80_000, 90_000] if times <= 2 else [total - 60_000, total - 20_000, total]
    return L("detectron2.solver.WarmupParamScheduler")(
        scheduler=L("fvcore.common.param_scheduler.MultiStepParamScheduler")(
            values=[1.0, 0.1, 0.01], milestones=milestones
        ),
        warmup_length=1000 / total,
        warmup_method="linear",
        warmup_factor=0.001,
    )


def _constants() -> DictConfig:
    return _config(
        constants=_config(
            imagenet_rgb256_mean=_RGB_MEAN,
            imagenet_rgb256_std=_RGB_STD,
            imagenet_bgr256_mean=_RGB_MEAN[::-1],
            imagenet_bgr256_std=[1.0, 1.0, 1.0],
        )
    )


def _coco() -> DictConfig:
    def resize(**arguments: Any) -> DictConfig:
        return L(f"{_DATA}.transforms.ResizeShortestEdge")(max_size=1333, **arguments)

    def part(split: str, **arguments: Any) -> DictConfig:
        return L(f"{_DATA}.get_detection_dataset_dicts")(names=f"coco_2017_{split}", **arguments)

    mapper = f"{_DATA}.DatasetMapper"
    return _config(
        dataloader=_config(
            train=L(f"{_DATA}.build_detection_train_loader")(
                dataset=part("train"),
                mapper=L(mapper)(
                    is_train=True,
                    augmentations=[
                        resize(short_edge_length=(640, 672, 704, 736, 768, 800), sample_style="choice"),
                        L(f"{_DATA}.transforms.RandomFlip")(horizontal=True),
                    ],
                    image_format="BGR",
                    use_instance_mask=True,
                ),
                total_batch_size=16,
                num_workers=4,
            ),
            test=L(f"{_DATA}.build_detection_test_loader")(
                dataset=part("val", filter_empty=False),
                mapper=L(mapper)(
                    is_train=False,
                    augmentations=[resize(short_edge_length=800)],
                    image_format="${...train.mapper.image_format}",
                ),
                num_workers=4,
            ),
            evaluator=L("detectron2.evaluation.COCOEvaluator")(dataset_name="${..test.dataset.names}"),
        )
    )


def _resnet(outputs: list[str]) -> DictConfig:
    return L(f"{_BACKBONES}.ResNet")(
        stem=L(f"{_BACKBONES}.BasicStem")(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(f"{_BACKBONES}.ResNet.make_default_stages")(depth=50, stride_in_1x1=True, norm="FrozenBN"),
        out_features=outputs,
    )


def _shipped(name: str, outputs: list[str]) -> DictConfig:
    """A shipped detector with Detectron2's ResNet, BGR images and no norms."""
    from .loader import load

    model = load(f"common/{name}").model
    model.backbone.update(bottom_up=_resnet(outputs), in_features=outputs, norm="")
    model.update(pixel_mean=_RGB_MEAN[::-1], pixel_std=[1.0, 1.0, 1.0], input_format="BGR")
    return model


def _mask_rcnn(name: str = "mask_rcnn") -> DictConfig:
    model = _shipped(name, ["res2", "res3", "res4", "res5"])
    model.backbone.in_features = "${.bottom_up.out_features}"
    model.proposal_generator.head.conv_dims = [-1]
    heads = model.roi_heads
    for head in heads.box_heads if "box_heads" in heads else [heads.box_head]:
        head.update(conv_dims=[], fc_dims=[1024, 1024], conv_norm="")
    heads.mask_head.conv_norm = ""
    return _config(model=model)


def _retinanet() -> DictConfig:
    model = _shipped("retinanet", ["res3", "res4", "res5"])
    model.backbone.top_block.update(in_channels=2048, in_feature="res5")
    return _config(model=model)


def _vitdet() -> DictConfig:
    from functools import partial

    from torch import nn

    model = _mask_rcnn().model
    model.update(pixel_mean=_RGB_MEAN, pixel_std=_RGB_STD, input_format="RGB")
    model.backbone = L("detectron2.modeling.SimpleFeaturePyramid")(
        net=L("detectron2.modeling.ViT")(
            img_size=1024,
            patch_size=16,
            embed_dim=768,
            depth=12,
            num_heads=12,
            drop_path_rate=0.1,
            window_size=14,
            mlp_ratio=4,
            qkv_bias=True,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            window_block_indexes=[block for block in range(12) if block % 3 != 2],
            residual_block_indexes=[],
            use_rel_pos=True,
            out_feature="last_feat",
        ),
        in_feature="${.net.out_feature}",
        out_channels=256,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=L(f"{_BACKBONES}.fpn.LastLevelMaxPool")(),
        norm="LN",
        square_pad=1024,
    )
    model.roi_heads.box_head.update(conv_dims=[256] * 4, fc_dims=[1024], conv_norm="LN")
    model.roi_heads.mask_head.conv_norm = "LN"
    model.proposal_generator.head.conv_dims = [-1, -1]
    return _config(model=model)


# Path below Detectron2's configs/ -> a function that returns its sections.
PARTS: Mapping[str, Callable[[], DictConfig]] = {
    "common/train.py": _train,
    "common/optim.py": _optim,
    "common/coco_schedule.py": _schedules,
    "common/data/coco.py": _coco,
    "common/data/constants.py": _constants,
    "common/models/mask_rcnn_fpn.py": _mask_rcnn,
    "common/models/cascade_rcnn.py": lambda: _mask_rcnn("cascade_mask_rcnn"),
    "common/models/retinanet.py": _retinanet,
    "common/models/mask_rcnn_vitdet.py": _vitdet,
}
