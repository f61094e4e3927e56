"""``checkpointing="auto"`` and ``recompute="auto"``: backward recomputes only what the device has no room for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import nn

logger = logging.getLogger(__name__)

AUTO = "auto"
# What backward recomputes, by (checkpointing, selective recomputation).
_MEANING = {
    (False, False): "nothing",
    (False, True): "outputs of norms and GELU",
    (True, False): "blocks",
    (True, True): "blocks, and in them outputs of norms and GELU",
}
# FPN and heads save 0.5 (bfloat16) to 0.7 times (float32) what MIMDet-Base's backbone does without recomputation, as
# ``activation_bytes`` counts at 480x640. Workspaces, the caching allocator and other processes need memory too.
_BACKBONE_SHARE = 0.5
# A float32 parameter gets a gradient and AdamW's two moments.
_BYTES_OF_UPDATE = 12
# Sides of the square images of which activation memory is counted; it is linear in the number of pixels.
_COUNTED_SIDES = (64, 128)


class AutoRecompute:
    """Sets ``checkpointing`` and ``recompute`` of a backbone by the size of its batches.

    The first training step decides. A larger batch later may make backward recompute more, never less. Selective
    recomputation changes no bit; with checkpointing, sums between blocks round differently.

    Args:
        checkpointing: True, False or "auto".
        recompute: "lean", "none" or "auto".
    """

    def __init__(self, checkpointing: bool | str, recompute: str):
        choices = (
            (False, True) if checkpointing == AUTO else (bool(checkpointing),),
            (False, True) if recompute == AUTO else (recompute == "lean",),
        )
        # From the most activation memory to the least. Checkpointed blocks gain nothing from saving more inside.
        modes = list(product(*choices))
        self.modes = [mode for mode in modes if len(modes) < 4 or mode != (True, False)]
        self.level = -1
        self.largest = 0
        self._bytes: list[tuple[float, float]] = []

    def fit(
        self,
        parts: Sequence[nn.Module],
        shape: tuple[int, int, int],
        run: Callable[[int], object],
        device: torch.device,
    ) -> None:
        """Make room for a batch of images before its forward.

        Args:
            parts: modules to set, with all that is in them.
            shape: (B, H, W) of the batch, padded.
            run: side -> the result of a forward of one square image, from which activation memory is counted.
            device: of the batch.
        """
        batch, height, width = shape
        pixels = batch * height * width
        if pixels <= self.largest or (len(self.modes) == 1 and self.level == 0):
            return
        self.largest = pixels
        if not self._bytes:
            self._bytes = [self._count(parts, mode, run) for mode in self.modes]
        room = free_bytes(parts, device)
        needs = [constant + slope * pixels for constant, slope in self._bytes]
        first_fit = next((level for level, need in enumerate(needs) if need <= room), len(needs) - 1)
        level = max(self.level, first_fit)
        set_recomputation(parts, self.modes[level])
        if level != self.level:
            logger.info(
                "backward recomputes %s: otherwise %d x %dx%d pixels take %.2f GiB in the backbone, of %.2f GiB on %s",
                _MEANING[self.modes[level]], batch, height, width, needs[0] / 2**30, room / 2**30, device,
            )  # fmt: skip
        self.level = level

    @staticmethod
    def _count(
        parts: Sequence[nn.Module], mode: tuple[bool, bool], run: Callable[[int], object]
    ) -> tuple[float, float]:
        """Activation memory in bytes as (constant, per pixel)."""
        set_recomputation(parts, mode)
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        devices = sorted({t.get_device() for t in tensors if t.is_cuda})
        with torch.random.fork_rng(devices):
            small, large = (activation_bytes(lambda side=side: run(side), tensors) for side in _COUNTED_SIDES)
        first, second = (side * side for side in _COUNTED_SIDES)
        slope = (large - small) / (second - first)
        return small - slope * first, slope


def set_recomputation(parts: Iterable[nn.Module], mode: tuple[bool, bool]) -> None:
    """Set ``mode``, (checkpointing, selective recomputation), in modules and all that is in them."""
    for part in parts:
        for module in part.modules():
            if isinstance(getattr(module, "checkpointing", None), bool):
                module.checkpointing = mode[0]
            if isinstance(getattr(module, "recompute", None), bool):
                module.recompute = mode[1]


def activation_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors that autograd saves for backward: each storage once, parameters excluded."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address and address not in weights:
            saved[address] = tensor.detach()  # keeps the storage alive: its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del result
    return total


def free_bytes(parts: Iterable[nn.Module], device: torch.device) -> int:
    """Bytes that a backbone's activations may take: half of what is free once gradients and moments exist."""
    parameters = [p for part in parts for p in part.parameters() if p.requires_grad and p.grad is None]
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = _free_on_host()
    return max(0, int(_BACKBONE_SHARE * (free - _BYTES_OF_UPDATE * sum(p.numel() for p in parameters))))


def _free_on_host() -> int:
    """Available memory of the machine, or of the container (cgroup v2) if that is less, in bytes."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no cgroup v2
        return free
    return free if limit == "max" else min(free, int(limit) - used)
