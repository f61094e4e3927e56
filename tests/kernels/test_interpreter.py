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
              "match_boxes", "nms_slots", "rasterize_polygons", "roi_align_levels",
              "sample_tokens", "scatter_fill")  # fmt: skip
# The longest files, by operation.
PARTS = ("norm", "attention or roi_align", "not norm and not attention and not roi_align")
LONG = [(name, part) for name in ("failure_modes", "operations") for part in PARTS]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("name", "tests"), [*LONG, *((name, "") for name in (*OPERATIONS, "shim"))])
def test_under_the_interpreter(name, tests):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", tests)
    command = [sys.executable, "-m", "pytest", *options, str(HERE / f"test_{name}.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
