"""Triton's kernels without a GPU: the operations' tests run under the interpreter, in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# One process per file, so that test workers share them.
OPERATIONS = ("add_layer_norm", "attention_varlen", "batch_norm", "bias_gelu", "gather_add_pos", "image_norm",
              "rasterize_polygons", "roi_align_levels",
              "sample_tokens", "scatter_fill")  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", [*OPERATIONS, "failure_modes", "shim"])
def test_under_the_interpreter(name):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *options, str(HERE / f"test_{name}.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
