"""Files that are no checkpoints, or run code: errors name what they are, and nothing in them runs."""

import argparse
import gzip
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from mimdet.checkpoint.read import CheckpointError, read_checkpoint, state_dict_of


class Reduced:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.pth"))
    return file.getvalue()


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return file.getvalue()


def compressed(content):
    """A checkpoint whose zip entries are compressed, as torch.save never does."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return file.getvalue()


KINDS = {
    "empty": (b"", "it is empty; copy or download it again"),
    "html": (b"<!DOCTYPE html>\n<html>not found</html>", r"web page \(HTML or XML\).*download the file itself"),
    "indented-html": (b"\xef\xbb\xbf\n  <html>" + b"x" * 1000, r"web page"),
    "text": (b"Quota exceeded\n", "text file, beginning with 'Quota exceeded'"),
    "cut-utf8": (("a" + "\u00e9" * 400).encode(), "text file, beginning with 'a\u00e9"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "zeros": (bytes(2000), "begins with zeros, as an unfinished download"),
    "gzip": (gzip.compress(b"x"), "gzip archive: unpack it"),
    "tar": (tarred(), "tar archive: unpack it"),
    "zip": (zipped("a.pth"), "zip archive that torch.save did not write"),
    "pickle": (pickle.dumps({"x": 1}), "pickle that torch.save did not write"),
    "pickle-2": (pickle.dumps({"x": 1}, protocol=2), "pickle that torch.save did not write"),
    "numpy": (b"\x93NUMPY\x01\x00", "NumPy array"),
    "safetensors": (save_safetensors({"x": torch.zeros(1)}), r"safetensors file: convert it: torch\.save"),
    "torchscript": (zipped("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"), "TorchScript model, which is code"),
    "garbage": (bytes(range(255, 0, -1)) * 9, r"Unsupported operand 255\. It may be cut short"),
    "cut": (saved({"x": torch.zeros(999)})[:-1], "may be cut short .* copy or download it again"),
    "cut-old": (saved({"x": torch.zeros(999)}, _use_new_zipfile_serialization=False)[:-1], "may be cut short"),
    "bomb": (compressed(saved({"x": torch.zeros(300_000)})), r"unpack to 12\d{5} bytes, as no compressed weights do"),
    "huge-array": (
        saved({"x": Reduced(np._core.multiarray._reconstruct, np.ndarray, (10**15,), b"b")}),
        r"asks for more than this machine's memory .*909\. TiB",
    ),
    "huge-bytes": (saved({"x": Reduced(bytearray, 10**17)}), "more than this machine's memory"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_a_file_is_named_for_what_it_is(tmp_path, kind):
    content, message = KINDS[kind]
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} cannot be read as a checkpoint ({len(content)} bytes): ")
    assert not re.search("weights.only", str(caught.value), re.IGNORECASE)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Reduced(os.system, "touch RAN"), r"(posix|nt)\.system"),
        (Reduced(sys.exit, 3), r"sys\.exit"),
        (Reduced(eval, "open('RAN', 'w')"), "eval"),
        (Reduced(subprocess.Popen, ["touch", "RAN"]), r"\w+\.Popen"),
        (Reduced(torch.load, "x.pth"), r"torch\.serialization\.load"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
    ],
    ids=["blocked-module", "exit", "builtin", "popen", "torch", "module"],
)
def test_code_is_refused_by_name_and_never_advised(tmp_path, monkeypatch, call, name, old):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "x": call}, "evil.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=rf"^evil\.pth wants to run {name} while it is read, and is refused") as e:
        read_checkpoint("evil.pth")
    assert not re.search("weights.only", str(e.value), re.IGNORECASE)
    assert not (tmp_path / "RAN").exists()


ADVICE = "Weights only load failed. Re-running `torch.load` with `weights_only` set to `False` will likely succeed.\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Unsupported global: GLOBAL a.b was not an allowed global by default.", r"wants to run a\.b while"),
        ("\n\nTrying to load unsupported GLOBAL os.x whose module os is blocked.", r"wants to run os\.x while"),
        ("Trying to call reduce for unrecognized function <function f>", "wants to run <function f> while"),
        (
            "Can only create new object for nn.Parameter or classes allowlisted via `add_safe_globals` but got "
            "<class 'a.B'>",
            r"wants to run a\.B while",
        ),
        (
            "Can only build Tensor or types allowlisted via `add_safe_globals`, but got <class 'c.D'>",
            r"wants to run c\.D while",
        ),
        ("Please file an issue: WeightsUnpickler error: \n\nUnsupported operand 149", "Unsupported operand 149"),
        ("", "it holds more than tensors and plain values"),
    ],
)
def test_torchs_own_advice_is_never_repeated(tmp_path, monkeypatch, text, message):
    """Messages of torch 2.11 to 2.15."""

    def refuse(*args, **kwargs):
        raise RuntimeError(ADVICE + text)

    torch.save({"x": torch.zeros(1)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert not re.search("weights.only", str(caught.value), re.IGNORECASE)


def test_slightly_compressed_and_old_files_still_load(tmp_path):
    weights = {"x": torch.randn(500)}
    for content in (compressed(saved(weights)), saved(weights, _use_new_zipfile_serialization=False), saved(weights)):
        (tmp_path / "a.pth").write_bytes(content)
        assert torch.equal(read_checkpoint(tmp_path / "a.pth")["x"], weights["x"])


def test_numpy_values_and_namespaces_are_data(tmp_path):
    torch.save({"args": argparse.Namespace(lr=np.float64(0.5)), "array": np.arange(3)}, tmp_path / "a.pth")
    content = read_checkpoint(tmp_path / "a.pth")
    assert (content["args"].lr, content["array"].tolist()) == (0.5, [0, 1, 2])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**12),
        torch.empty(10**12, device="meta"),
        torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (10**12,)),
    ],
    ids=["expanded", "meta", "sparse"],
)
def test_tensors_without_values_are_named(tmp_path, tensor):
    path = tmp_path / "a.pth"
    torch.save({"model": {"good": torch.zeros(1).expand(3), "huge": tensor}}, path)
    with pytest.raises(CheckpointError, match=r"a\.pth: huge is said to be torch.float32 \(1000000000000,\)"):
        state_dict_of(read_checkpoint(path), path)


def test_folders_and_unreadable_paths_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"no checkpoint at {re.escape(str(tmp_path))}, which is a folder"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be opened: File name too long"):
        read_checkpoint(tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint("/dev/zero")
