"""Read a checkpoint file without running code from it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

# MAE's files carry the command line of their training; numpy scalars stand in some trainers' states.
SAFE_GLOBALS = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    np._core.multiarray._reconstruct,
    np._core.multiarray.scalar,
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "uint8", "uint32", "bool")),
]


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or made for another model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a ``.pth`` or ``.safetensors`` file, tensors on the CPU.

    Only tensors and plain values are read (``weights_only``); a file that wants anything else is refused.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint; the message names the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for damaged files
        if found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
            raise CheckpointError(
                f"{path} wants to run {found[1]} while it is read, and is refused: only tensors and plain values are "
                "read. If you trust the file, load it with torch.load(weights_only=False) and save its state_dict."
            ) from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({path.stat().st_size} bytes): {reason} "
            "It may be cut short or not a PyTorch file; copy or download it again."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    return dict(content)


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: under "model" or "state_dict", or the mapping itself.

    Raises:
        CheckpointError: no tensors in it.
    """
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {k: torch.as_tensor(v) for k, v in content.items() if isinstance(v, (torch.Tensor, np.ndarray))}
    if not tensors:
        raise CheckpointError(f'{path} holds no weights: expected {{"model": state_dict}} or a bare state_dict')
    return tensors


def strip_prefixes(state: Mapping[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """``state`` with any leading prefixes taken off its keys, again and again: ``module.encoder.x`` -> ``x``."""

    def bare(key: str) -> str:
        while True:
            for prefix in prefixes:
                if key.startswith(prefix):
                    key = key[len(prefix) :]
                    break
            else:
                return key

    return {bare(key): value for key, value in state.items()}
