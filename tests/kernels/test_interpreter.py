"""Triton's kernels without a GPU: the operations' tests run under the interpreter, in a process of their own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Files of a process, which test workers share; of the longest ones a process has some of the operations.
PARTS = ("norm", "attention or roi_align", "not norm and not attention and not roi_align")
PROCESSES = [
    *((name, part) for name in ("failure_modes", "operations") for part in PARTS),
    ("attention_varlen", ""),
    ("match_boxes nms_slots shim", ""),
    ("rasterize_polygons roi_align_levels sample_tokens", ""),
    ("add_layer_norm batch_norm bias_gelu gather_add_pos image_norm scatter_fill", ""),
]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(("names", "tests"), PROCESSES)
def test_under_the_interpreter(names, tests):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    options = ("-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-k", tests)
    files = [str(HERE / f"test_{name}.py") for name in names.split()]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent.parent)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
