"""Read a checkpoint file without running code from it."""

from __future__ import annotations

import argparse
import codecs
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

# weights_only: MAE's files hold an argparse.Namespace, some trainers' states numpy scalars.
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
    """Content of a ``.pth`` or ``.safetensors`` file, tensors on the CPU.

    Only tensors and plain values are read (``weights_only``); a file that needs anything else is refused.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint; the message names the file and what it is instead.
    """
    path = Path(path).expanduser()
    try:
        if not path.is_file():
            raise CheckpointError(f"no checkpoint at {path}" + (", which is a folder" if path.is_dir() else ""))
        size = path.stat().st_size
        reason = _no_checkpoint(path, size)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be opened: {error.strerror or error}") from error
    if reason is not None:
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({size} bytes): {reason}")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            if path.suffix == ".safetensors":
                content = load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types for damaged files
        if name := _refused(str(error)):
            raise CheckpointError(
                f"{path} wants to run {name} while it is read, and is refused: only tensors and plain values are "
                "read. Get its weights alone, a state_dict, from where the file comes from."
            ) from error
        raise CheckpointError(f"{path} cannot be read as a checkpoint ({size} bytes): {_reason(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint dictionary")
    return dict(content)


_AGAIN = "copy or download it again"
_CONVERT = "convert it: torch.save(safetensors.torch.load_file(FILE), 'weights.pth')"
_KINDS = {
    b"version https://git-lfs": "it is Git LFS's pointer to the file, not the file: run git lfs pull",
    b"\x1f\x8b": "it is a gzip archive: unpack it",
    b"BZh": "it is a bzip2 archive: unpack it",
    b"\xfd7zXZ\0": "it is an xz archive: unpack it",
    b"\x28\xb5\x2f\xfd": "it is a zstd archive: unpack it",
    b"7z\xbc\xaf": "it is a 7z archive: unpack it",
    b"\x89HDF\r\n": "it is an HDF5 file, not one that torch.save wrote",
    b"\x93NUMPY": "it is a NumPy array, not one that torch.save wrote",
    b"\x89PNG": "it is an image",
    b"\xff\xd8\xff": "it is an image",
}
_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")  # near the start of torch.save's files before PyTorch 1.6
_MOST_COMPRESSED = 10  # torch.save does not compress, and weights that others compress hardly shrink


def _no_checkpoint(path: Path, size: int) -> str | None:
    """Why a file cannot be a checkpoint, from its first bytes and its zip directory; None if it may be one."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return f"it is empty; {_AGAIN}"
    if not head.strip(b"\0"):
        return f"it begins with zeros, as an unfinished download does; {_AGAIN}"
    for start, kind in _KINDS.items():
        if head.startswith(start):
            return kind
    if head[257:262] == b"ustar":
        return "it is a tar archive: unpack it"
    if head.startswith(b"PK\x03\x04"):
        return _no_checkpoint_zip(path, size)
    if head.startswith(b"\x80") and _MAGIC not in head:
        return "it is a pickle that torch.save did not write, and pickles may run code: save the weights with torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        # safetensors files are recognized by their name.
        return None if path.suffix == ".safetensors" else f"it is a safetensors file: {_CONVERT}"
    text = _text(head)
    if text is not None and text.lstrip().startswith("<"):
        return (
            "it is a web page (HTML or XML), such as a login or error page that a download got instead of the file: "
            "open the address in a browser and download the file itself"
        )
    return None if text is None else f"it is a text file, beginning with {text.strip()[:40]!r}"


def _no_checkpoint_zip(path: Path, size: int) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None  # torch.load reports it
    files = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in files:
        return "it is a TorchScript model, which is code: save the state_dict of the model that it was made from"
    if "data.pkl" not in files:
        return "it is a zip archive that torch.save did not write: if the checkpoint is in it, unpack it"
    content = sum(entry.file_size for entry in entries)
    if content > _MOST_COMPRESSED * size:
        return f"it would unpack to {content} bytes, as no compressed weights do; torch.save writes them uncompressed"
    return None


def check_sums(path: str | Path) -> None:
    """Compare a file of ``torch.save`` with its checksums, which ``torch.load`` does not; files before 1.6 have none.

    Raises:
        CheckpointError: a disk or a copy has changed it; names the file.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} in it does not match its checksum")


def _text(head: bytes) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return None
    return text if all(character.isprintable() or character.isspace() for character in text) else None


def _refused(message: str) -> str | None:
    """Name of the function or class that torch refused to import or call; None for other errors."""
    patterns = (
        r"\bGLOBAL (\S+)",
        r"unrecognized function (.+)",
        r"`add_safe_globals`,? but got <class '([^']+)'>",
    )
    return next((match[1] for pattern in patterns if (match := re.search(pattern, message))), None)


def _reason(error: Exception) -> str:
    """The reason in torch's error, without its advice to load the file unsafely."""
    if isinstance(error, MemoryError) or "allocate" in str(error):
        return f"it asks for more than this machine's memory ({_first_line(error)}): it is damaged or made to harm"
    text = _first_line(error)
    if "safetensors" in text:
        return f"{text} Or {_CONVERT}"
    if re.search(r"weights.only", text, re.IGNORECASE):
        match = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
        text = match[1].strip() if match else "it holds more than tensors and plain values"
    return f"{text.rstrip('.')}. It may be cut short or not a PyTorch file; {_AGAIN}."


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def state_dict_of(content: Mapping[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint: under "model" or "state_dict", or the mapping itself.

    Raises:
        CheckpointError: no tensors, or a tensor whose values are not in the file.
    """
    for key in ("model", "state_dict"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {k: torch.as_tensor(v) for k, v in content.items() if isinstance(v, (torch.Tensor, np.ndarray))}
    if not tensors:
        raise CheckpointError(f'{path} holds no weights: expected {{"model": state_dict}} or a bare state_dict')
    for key, value in tensors.items():
        if not _has_values(value):
            raise CheckpointError(
                f"{path}: {key} is said to be {value.dtype} {tuple(value.shape)}, but the file does not hold its values"
            )
    return tensors


_MOST_EXPANDED = 2**28  # bytes of a tensor with more elements than stored values, such as an expanded one


def _has_values(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta:
        return False
    size = tensor.numel() * tensor.element_size()
    return size <= max(_MOST_EXPANDED, tensor.untyped_storage().nbytes())


def strip_prefixes(state: Mapping[str, torch.Tensor], prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """``state`` without any leading prefixes of its keys: ``module.encoder.x`` -> ``x``."""

    def bare(key: str) -> str:
        while True:
            for prefix in prefixes:
                if key.startswith(prefix):
                    key = key[len(prefix) :]
                    break
            else:
                return key

    return {bare(key): value for key, value in state.items()}
