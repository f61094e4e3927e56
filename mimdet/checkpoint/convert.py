"""Convert checkpoints of MAE, of the original MIMDet and of this project into one another."""

from __future__ import annotations

from pathlib import Path

import torch

from ..files import write_atomically
from .mae import read_mae
from .read import CheckpointError, read_checkpoint, state_dict_of, strip_prefixes

_PARTS = {"backbone.bottom_up.encoder.": "encoder", "backbone.bottom_up.decoder.": "decoder"}
_NOT_IN_MAE = ("patch_embed.", "conv_feat_proj.")
_DROPPED_FROM_MAE = ("patch_embed.", "cls_token", "mask_token", "decoder_pred.")


def convert_checkpoint(source: str | Path, target: str | Path, to: str, force: bool = False) -> list[str]:
    """Read ``source`` and write ``target`` in another format.

    Args:
        source: a detector's checkpoint (of this project or the original) or a full MAE checkpoint.
        target: file to write, atomically.
        to: "detector": weights and class names only. "mae": the detector's encoder and decoder under MAE's
            names. "backbone": MAE's encoder and decoder under the detector's names.
        force: replace an existing ``target``.

    Returns:
        lines that say what was written.

    Raises:
        CheckpointError: ``source`` is unreadable or cannot be converted to ``to``.
        FileExistsError: ``target`` exists, without ``force``.
        ValueError: unknown ``to``, or ``source`` and ``target`` are the same file.
    """
    makers = {"detector": _detector, "mae": _mae, "backbone": _backbone}
    if to not in makers:
        raise ValueError(f"cannot convert to {to!r}; one of {', '.join(makers)}")
    existing = Path(target).resolve()  # target may begin with folders that are made before it is written
    if existing.exists():
        if Path(source).exists() and existing.samefile(source):
            raise ValueError(f"cannot convert {source} into itself: what the new file leaves out would be lost")
        if not force:
            raise FileExistsError(f"{target} exists: give another target, or --force to replace it")
    content, lines = makers[to](Path(source))
    write_atomically(target, lambda file: torch.save(content, file))
    size = Path(target).stat().st_size / 2**20
    return [*lines, f"wrote {len(content['model'])} tensors, {size:.1f} MiB, to {target}"]


def _read_detector(source: Path, part: str) -> tuple[dict[str, torch.Tensor], dict]:
    content = read_checkpoint(source)
    state = strip_prefixes(state_dict_of(content, source), ("module.",))
    if not any(key.startswith(part) for key in state):
        raise CheckpointError(f"{source} is not a MIMDet detector: it has no {part}* weights")
    return state, content


def _detector(source: Path) -> tuple[dict, list[str]]:
    state, content = _read_detector(source, "backbone.bottom_up.")
    content_out = {"model": state} | {key: content[key] for key in ("meta",) if key in content}
    dropped = sorted(set(content) - {"model", "meta"} - set(state))
    return content_out, [f"left out: {', '.join(dropped) or 'nothing'}"]


def _mae(source: Path) -> tuple[dict, list[str]]:
    state, _ = _read_detector(source, "backbone.bottom_up.encoder.")
    out = {}
    for key, value in state.items():
        for prefix in _PARTS:
            bare = key.removeprefix(prefix)
            if bare != key and not bare.startswith(_NOT_IN_MAE):
                out[bare] = value
    line = "left out, as MAE has no such part: ConvStem, conv_feat_proj, pyramid and heads"
    return {"model": out}, [line, "not in it, as a detector has no such part: patch_embed, cls_token, decoder_pred"]


def _backbone(source: Path) -> tuple[dict, list[str]]:
    out, dropped = {}, []
    for key, value in read_mae(source).items():
        if key.startswith(_DROPPED_FROM_MAE):
            dropped.append(key)
            continue
        part = "decoder" if key.startswith("decoder_") else "encoder"
        out[f"backbone.bottom_up.{part}.{key}"] = value
    return {"model": out}, [f"left out, as a detector has no such part: {', '.join(dropped) or 'nothing'}"]
