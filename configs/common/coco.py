"""COCO 2017 with the paper's augmentations: flip, resize or resize-crop-resize."""

from omegaconf import OmegaConf

from mimdet.config import LazyCall as L
from mimdet.data import (
    AugmentationList,
    CocoDataset,
    DatasetMapper,
    RandomApply,
    RandomCrop,
    RandomFlip,
    ResizeShortestEdge,
    build_detection_test_loader,
    build_detection_train_loader,
)
from mimdet.evaluation import COCOEvaluator

dataloader = OmegaConf.create(flags={"allow_objects": True})

dataloader.train = L(build_detection_train_loader)(
    dataset=L(CocoDataset)(names="coco_2017_train", json_file=None, image_root=None, filter_empty=True, use_masks=True),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[
            L(RandomFlip)(horizontal=True),
            L(RandomApply)(
                tfm_or_aug=L(AugmentationList)(
                    augs=[
                        L(ResizeShortestEdge)(short_edge_length=(400, 500, 600), sample_style="choice"),
                        L(RandomCrop)(crop_type="absolute_range", crop_size=(384, 600)),
                    ]
                ),
                prob=0.5,
            ),
            L(ResizeShortestEdge)(
                short_edge_length=(480, 512, 544, 576, 608, 640, 736, 768, 800),
                max_size=1333,
                sample_style="choice",
            ),
        ],
        image_format="RGB",
        use_instance_mask=True,
    ),
    total_batch_size=64,
    num_workers=4,
    aspect_ratio_grouping=True,
    seed="${train.seed}",
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(CocoDataset)(names="coco_2017_val", json_file=None, image_root=None, filter_empty=False, use_masks=True),
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[L(ResizeShortestEdge)(short_edge_length=800, max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    batch_size=1,
    num_workers=4,
)

dataloader.evaluator = L(COCOEvaluator)(output_dir="${train.output_dir}", max_dets_per_image=100)
