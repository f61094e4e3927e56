"""Load a MAE pre-training checkpoint into a part of a backbone, and log what was loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..pos_embed import interpolate_pos_embed
from .finite import check_finite
from .read import CheckpointError, read_checkpoint, state_dict_of, strip_prefixes

logger = logging.getLogger(__name__)

_DECODER_PREFIXES = ("decoder_", "mask_token")
_FRESH = {
    "encoder": ("patch_embed.",),
    "decoder": ("conv_feat_proj.",),
    "benchmarking": ("ms_adaptor.", "windowed_rel_pos_bias.", "global_rel_pos_bias."),
}
_POS_EMBED = {"encoder": "pos_embed", "decoder": "decoder_pos_embed", "benchmarking": "pos_embed"}
_FULL_FILE = (
    "MIMDet needs MAE's full checkpoint, encoder and decoder (mae_pretrain_vit_base_full.pth or "
    "mae_pretrain_vit_large_full.pth of the MAE project), not the encoder-only one"
)


@dataclass
class LoadReport:
    """Which tensors of the module and of the file were loaded.

    Attributes:
        loaded: module keys that have the file's values now.
        resized: "key: 14x14 -> 50x50" for interpolated position tables.
        fresh: module keys that keep their initial values by design.
        dropped: file keys that this module does not use by design.
    """

    part: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"MAE -> {self.part}: {len(self.loaded)} tensors loaded"]
        lines += [f"  resized: {', '.join(self.resized)}"] if self.resized else []
        for name, keys in (("fresh by design", self.fresh), ("dropped by design", self.dropped)):
            lines.append(f"  {name}: {len(keys)}" + (f" ({', '.join(_families(keys))})" if keys else ""))
        return "\n".join(lines)


def _families(keys: list[str]) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in keys))


def read_mae(path: str | Path) -> dict[str, torch.Tensor]:
    """Weights of a MAE checkpoint under MAE's names, without prefixes of wrappers.

    Raises:
        CheckpointError: the file cannot be read or is not a MAE checkpoint.
    """
    state = strip_prefixes(state_dict_of(read_checkpoint(path), path), ("module.", "encoder."))
    if not any(key.startswith("blocks.0.") for key in state):
        raise CheckpointError(f"{path} is not a MAE checkpoint: it has no blocks.0.*. {_FULL_FILE}.")
    return state


def load_mae(
    module: nn.Module,
    path: str | Path,
    part: Literal["encoder", "decoder", "benchmarking"],
    keep: Collection[str] = (),
) -> LoadReport:
    """Copy MAE weights into a ``MIMDetEncoder``, ``MIMDetDecoder`` or ``BenchmarkingViTDet`` and log a short report.

    - Loaded: blocks, norms, projections and position tables, interpolated to the module's grid.
    - Fresh, as MAE has no counterpart: the stem and ``conv_feat_proj``.
    - Dropped: patch_embed, cls_token, decoder_pred, the other part's tensors, spare decoder blocks, and mask_token
      unless the decoder fills with it.

    For ``BenchmarkingViTDet`` patch_embed is loaded, the last norm and the decoder are dropped, and its adaptor and
    relative position biases stay fresh.

    Args:
        keep: keys that stay fresh.

    Raises:
        CheckpointError: another tensor is missing, unexpected or of another shape, or values are NaN or infinite.
    """
    state = read_mae(path)
    module_state = module.state_dict()
    report = LoadReport(part)
    problems: list[str] = []
    values: dict[str, torch.Tensor] = {}
    for key, target in module_state.items():
        if key in keep or key.startswith(_FRESH[part]):
            report.fresh.append(key)
        elif key not in state:
            problems.append(f"{key} is not in the file")
        else:
            value = state[key]
            if key == _POS_EMBED[part] and value.ndim == 3 and value.shape != target.shape:
                value = _resize_pos_embed(value, target, key, report)
            if value.shape == target.shape:
                values[key] = value
                report.loaded.append(key)
            else:
                problems.append(f"{key} is {tuple(value.shape)} in the file, {tuple(target.shape)} in the model")
    report.dropped += [key for key in keep if key in state]
    for key in (k for k in state if k not in module_state):
        if _dropped_by_design(key, part):
            report.dropped.append(key)
        else:
            problems.append(f"{key} of the file has no place in the model")
    if problems:
        raise CheckpointError(_explain(path, part, problems, state, module_state))
    check_finite(values, path)
    module.load_state_dict(values, strict=False)
    logger.info("%s", report)
    return report


def _dropped_by_design(key: str, part: str) -> bool:
    in_decoder = key.startswith(_DECODER_PREFIXES)
    if part == "benchmarking":
        return in_decoder or key == "cls_token" or key.startswith("norm.")
    if key in ("cls_token", "mask_token") or key.startswith(("patch_embed.", "decoder_pred.")):
        return True
    if part == "encoder":
        return in_decoder
    return not in_decoder or key.startswith("decoder_blocks.")


def _resize_pos_embed(value: torch.Tensor, target: torch.Tensor, key: str, report: LoadReport) -> torch.Tensor:
    old, new = isqrt(value.shape[1] - 1), isqrt(target.shape[1])
    report.resized.append(f"{key} {old}x{old} -> {new}x{new}")
    table = interpolate_pos_embed(value, (new, new))
    has_cls_row = target.shape[1] == new * new + 1
    return torch.cat([value[:, :1].float(), table], dim=1) if has_cls_row else table


def _explain(path: str | Path, part: str, problems: list[str], state: dict, module_state: dict) -> str:
    lines = [f"MAE checkpoint {path} does not fit the {part} ({len(problems)} problems):"]
    lines += [f"  {p}" for p in problems[:5]]
    lines += [f"  ... and {len(problems) - 5} more"] if len(problems) > 5 else []
    if part == "decoder" and not any(k.startswith("decoder_blocks.") for k in state):
        lines.append(_FULL_FILE + ".")
    else:
        prefix = "decoder_blocks." if part == "decoder" else "blocks."
        sizes = f"The file has {_size(state, prefix)}, the model {_size(module_state, prefix)}"
        lines.append(f"{sizes}: use the config of the file's size.")
    return "\n".join(lines)


def _size(state: dict[str, torch.Tensor], prefix: str) -> str:
    numbers = {int(key.split(".")[1]) for key in state if key.startswith(prefix)}
    if not numbers:
        return f"no {prefix[:-1]}"
    return f"{len(numbers)} {prefix[:-1]} of width {state[f'{prefix}{min(numbers)}.norm1.weight'].shape[0]}"
