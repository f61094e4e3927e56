"""``mimdet parity`` can fail: five kinds of mistakes in a copy of the package, in eager, C++ and the interpreter."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.kernels import usable
from support.paths import ROOT

TAIL = "c < channels / 16 * 16"
# File -> (right, wrong): what is wrong is an operation's forward or backward.
MUTATIONS = {
    "kernels/add_layer_norm/reference.py": [("bias.to(wide), eps)", "bias.to(wide), 10 * eps)")],
    "kernels/bias_gelu/reference.py": [
        # The mask leaves out the last channel; the gradient of the bias is added up in bfloat16.
        (
            "return F.gelu(x + bias).to(x.dtype)",
            "return torch.cat([F.gelu(x + _Expanded.apply(bias, x.shape))[..., :-1], x[..., -1:]], -1).to(x.dtype)",
        ),
        (
            "def bias_gelu(",
            "class _Expanded(torch.autograd.Function):\n"
            "    @staticmethod\n"
            "    def forward(ctx, bias, shape):\n"
            "        return bias.expand(shape).clone()\n\n"
            "    @staticmethod\n"
            "    def backward(ctx, gradient):\n"
            "        return gradient.flatten(0, -2).bfloat16().sum(0).to(gradient.dtype), None\n\n\n"
            "def bias_gelu(",
        ),
    ],
    "kernels/scatter_fill/reference.py": [
        ("def scatter_fill(", "_cache = {}\n\n\ndef scatter_fill("),
        (
            "    out = rows.flatten(0, 1)",
            "    pos = pos + 0 * pos.detach() if pos.requires_grad else _cache.setdefault(pos.shape, pos)\n"
            "    if rows.requires_grad:\n"
            "        rows.register_hook(lambda g: torch.cat([g[..., :16], 0 * g[..., 16:]], -1))\n"
            "    out = rows.flatten(0, 1)",
        ),
    ],
    "csrc/AddLayerNormCPU.cpp": [("shift * shift + eps)", "shift * shift + 10 * eps)")],
    "csrc/BiasGeluCPU.cpp": [
        ("c < C; ++c) {\n      store(to + c, gelu(", "c < C - 1; ++c) {\n      store(to + c, gelu("),
        ("db[c] += g;", "bf16 rounded;\n        store(&rounded, db[c] + g);\n        db[c] = load(&rounded);"),
    ],
    "csrc/RowsCPU.cpp": [
        ('#include "Rows.h"', '#include "Rows.h"\n#include <vector>'),
        (
            "const Out* shift = pos + (pos_at_source",
            "static thread_local std::vector<Out> cache;\n"
            "    const auto size = static_cast<decltype(cache.size())>(length * channels);\n"
            "    if (cache.size() != size) cache.assign(pos, pos + size);\n"
            "    const Out* shift = cache.data() + (pos_at_source",
        ),
        ("c < channels; ++c) store(to + c, load(from + c));", f"{TAIL}; ++c) store(to + c, load(from + c));"),
    ],
    "kernels/add_layer_norm/triton.py": [("/ C + eps)", "/ C + 10 * eps)")],
    "kernels/bias_gelu/triton.py": [
        ("mask = channel < C\n    offs", "mask = channel < C - 1\n    offs"),
        ("db += tl.sum(dz, axis=0)[None, :]", "db = (db + tl.sum(dz, axis=0)[None, :]).to(tl.bfloat16).to(tl.float32)"),
    ],
    "kernels/scatter_fill/triton.py": [
        ("import torch\n", "import torch\n\n_cache = {}\n"),
        ("fill, ids_restore, pos, y", "fill, ids_restore, _cache.setdefault(pos.shape, pos), y"),
    ],
    "kernels/triton_rows.py": [
        ("mask = (row < M)[:, None] & (channel < C)[None, :]\n    batch",
         "mask = (row < M)[:, None] & (channel < C // 16 * 16)[None, :]\n    batch"),
    ],
}  # fmt: skip
IMPLEMENTATIONS = ("eager", "cpp", "triton")
OPS = ("add_layer_norm", "bias_gelu", "scatter_fill")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's run in a copy of the package with all of these mistakes."""
    folder = tmp_path_factory.mktemp("wrong")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    shutil.copytree(ROOT / "mimdet", folder / "mimdet", ignore=ignored)
    for name, changes in MUTATIONS.items():
        file = folder / "mimdet" / name
        text = file.read_text(encoding="utf-8")
        for right, wrong in changes:
            assert right in text, (name, right)
            text = text.replace(right, wrong)
        file.write_text(text, encoding="utf-8")
    pattern = "[abs]*_[lgf]*-fp32-contiguous-small-*"
    command = [sys.executable, "-m", "mimdet", "parity", "--quick", "--only", pattern, "--json", "parity.json"]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "C++ kernels are off" not in done.stderr or not usable("bias_gelu", "cpp", "cpu"), done.stderr
    return json.loads((folder / "parity.json").read_text()), done.stdout


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", OPS)
def test_the_wrong_kernel_is_named(run, op, implementation):
    rows, printed = [row for row in run[0]["cases"] if row["op"] == op], run[1]
    rows = {row["direction"]: row for row in rows if row["implementation"] == implementation}
    if not rows and (implementation == "triton" or not usable(op, implementation, "cpu")):
        pytest.skip(f"no {implementation} here")
    assert set(rows) == {"forward", "backward"}
    for row in rows.values():
        assert row["status"] == "failed", row
        assert "above the budget" in row["message"] or "not finite" in row["message"]
        assert f"failed: {row['id']}: {row['message']}" in printed


def test_the_last_line_counts_them(run):
    content, printed = run
    assert printed.splitlines()[-1] == f"{len(content['cases'])} of {len(content['cases'])} cases failed"
