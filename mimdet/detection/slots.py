"""Boxes of a batch in slots, the same number for every image.

No shape depends on the data, so nothing waits for a GPU. Which slots hold a box is data: a mask beside them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.tensors import to_device_together
from ..polygons import PackedPolygons
from .masks import GroundTruthMasks

logger = logging.getLogger(__name__)

# Ground-truth boxes of an image of COCO: 93 at most.
GROUND_TRUTH_SLOTS = 128


class GroundTruth(NamedTuple):
    """Ground truth of B images in G slots each, of which the first ``counts`` are filled.

    Attributes:
        boxes: (B, G, 4) float32, pixels; (0, 0, 1, 1) in empty slots.
        labels: (B, G) int64; 0 in empty slots.
        counts: (B,) int64.
        most: the largest of them.
        masks: of the instances; None without masks.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    counts: torch.Tensor
    most: int
    masks: GroundTruthMasks | None = None

    @property
    def filled(self) -> torch.Tensor:
        """(B, G) bool."""
        return torch.arange(self.boxes.shape[1], device=self.counts.device) < self.counts[:, None]

    @classmethod
    def from_targets(cls, targets: Sequence[dict[str, Any]], device: torch.device, masks: bool) -> GroundTruth:
        """Targets of a detector's ``forward`` on a device.

        There are 128 slots, or the next power of two that holds all boxes of every image.
        """
        counts = [len(target["boxes"]) for target in targets]
        slots = _slots_for(max(counts))
        boxes = _stack([target["boxes"] for target in targets], slots, torch.float32, device)
        labels = _stack([target["labels"] for target in targets], slots, torch.int64, device)
        tensors, polygons = [boxes, labels, torch.tensor(counts)], []
        if masks:
            every = [target["masks"] for target in targets]
            packed = [_polygons(m, f"targets[{i}]['masks']").padded(slots) for i, m in enumerate(every)]
            # The last instance, without polygons, is that of slots which no proposal fills.
            joined = PackedPolygons.join([*packed, PackedPolygons.pack([[]])])
            polygons = [torch.from_numpy(a) for a in (joined.points, joined.polygon_starts, joined.instance_starts)]
        if device.type == "mps":  # it has no float64
            boxes, labels, filled = to_device_together(tensors, device)
        else:
            boxes, labels, filled, *polygons = to_device_together([*tensors, *polygons], device)
        truth = cls(boxes, labels, filled, max(counts))
        if masks:
            bitmaps = {i: m for i, m in enumerate(every) if isinstance(m, torch.Tensor)}
            truth = truth._replace(masks=GroundTruthMasks(*polygons, bitmaps, slots))
        return truth._replace(boxes=blank(boxes, truth.filled))


class Detections(NamedTuple):
    """Detections of B images in S slots each, best first.

    Attributes:
        boxes: (B, S, 4) float32, pixels.
        scores: (B, S) float32.
        labels: (B, S) int64.
        valid: (B, S) bool, the first ones of each image.
        mask_probabilities: (B, S, M, M) soft maps of the boxes; None without masks.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor
    mask_probabilities: torch.Tensor | None = None

    def tolist(self) -> list[dict[str, torch.Tensor]]:
        """The valid detections of each image by field, after the one wait for the GPU of a detection."""
        first = (~self.valid).to(torch.uint8).argsort(dim=1, stable=True)
        columns = {name: value for name, value in self._asdict().items() if name != "valid" and value is not None}
        columns = {name: take(value, first) for name, value in columns.items()}
        counts = self.valid.sum(1).tolist()
        return [{name: value[i, :count] for name, value in columns.items()} for i, count in enumerate(counts)]


class Rows:
    """Slots of a batch as rows of a head's input: all of them or, where counting costs nothing, the valid ones.

    On a CPU the valid ones are counted. On a GPU that would wait for it.

    Args:
        slots: (B, S) bool, which are valid.
        count: count them on a GPU too, for a head that cannot leave out rows.
    """

    def __init__(self, slots: torch.Tensor, count: bool = False):
        self.slots = slots
        self.index: torch.Tensor | None = None
        self.valid: torch.Tensor | None = slots.flatten()  # of the rows; None if all are
        if count or counting_is_free(slots.device):
            index = self.valid.nonzero().squeeze(1)
            self.valid = None
            self.index = index if len(index) < slots.numel() else None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """(B * S, ...) -> (R, ...); maps (B * S, C, H, W) stay in channels_last memory."""
        if self.index is None:
            return x
        if x.dim() == 4:
            return x.permute(0, 2, 3, 1).index_select(0, self.index).permute(0, 3, 1, 2)
        return x.index_select(0, self.index)

    def run(self, head: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        """A head's output of rows; it gets the mask of valid rows if not all are valid."""
        return head(*inputs) if self.valid is None else head(*inputs, valid=self.valid)

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """(R, ...) -> (B, S, ...), zero where there is no row."""
        if self.index is not None:
            x = x.new_zeros((self.slots.numel(), *x.shape[1:])).index_copy(0, self.index, x)
        return x.unflatten(0, self.slots.shape)


def counting_is_free(device: torch.device) -> bool:
    """Whether reading a number from the device waits for nothing."""
    return device.type == "cpu"


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(B, N, ...) and (B, S) -> (B, S, ...): the named slots of each image."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(shape))


def blank(boxes: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Boxes (..., 4) with (0, 0, 1, 1) where not ``valid`` (...): finite, and of positive size for the box coding."""
    unit = (torch.arange(4, device=boxes.device) // 2).to(boxes.dtype)
    return torch.where(valid.unsqueeze(-1), boxes, unit)


def _polygons(masks: Any, name: str) -> PackedPolygons:
    """Polygons of a target's masks, none where these are bitmaps."""
    if isinstance(masks, PackedPolygons):
        return masks
    return PackedPolygons.pack([[]] * len(masks) if isinstance(masks, torch.Tensor) else masks, name)


_told: set[int] = set()


def _slots_for(count: int) -> int:
    if count <= GROUND_TRUTH_SLOTS:
        return GROUND_TRUTH_SLOTS
    slots = 1 << (count - 1).bit_length()
    if slots not in _told:
        _told.add(slots)
        logger.warning("an image has %d ground-truth boxes: batches with such images get %d slots", count, slots)
    return slots


def _stack(tensors: Sequence[torch.Tensor], slots: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B, slots, ...), padded with zeros: on the CPU if all tensors are, else on the device."""
    place = torch.device("cpu") if all(t.device.type == "cpu" for t in tensors) else device
    tensors = [t.to(place, dtype, non_blocking=True) for t in tensors]
    return torch.stack([F.pad(t, (0, 0) * (t.dim() - 1) + (0, slots - len(t))) for t in tensors])
