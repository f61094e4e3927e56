"""Read the goldens and compare a candidate against them (numpy only).

    g = Golden("backbone_small")
    g.compare("r0.5_c4", array)            -> {"max_abs", "rel_l2", "floor_rel_l2"}
    g.check("r0.5_c4", array, rel_l2=1e-5) -> raises AssertionError when too far

`array` is the full tensor; the stored part is taken out of it here.
"""

import json
import re

import numpy as np
from support.paths import RECORDINGS


def take(a, index):
    """Apply a recorded index such as '[:, ::2]' or 'flatten()[::7]'."""
    if not index:
        return a
    if index.startswith("flatten()"):
        a, index = a.reshape(-1), index[len("flatten()") :]
    if not re.fullmatch(r"\[[0-9:, ]+\]", index):
        raise ValueError("not a plain index: " + index)
    sl = []
    for part in index[1:-1].split(","):
        f = [int(x) if x.strip() else None for x in part.split(":")]
        sl.append(slice(*f) if len(f) > 1 else f[0])
    return a[tuple(sl)]


class Golden:
    def __init__(self, name):
        with open(RECORDINGS / f"{name}.json") as f:
            self.meta = json.load(f)
        self.data = np.load(RECORDINGS / f"{name}.npz")

    def keys(self):
        return [k for k, v in self.meta.items() if isinstance(v, dict) and "npz_key" in v]

    def expected(self, key):
        return self.data[self.meta[key]["npz_key"]]

    def compare(self, key, array):
        m = self.meta[key]
        a = np.asarray(array)
        assert list(a.shape) == m["shape"], (key, a.shape, m["shape"])
        a = take(a, m["index"]).astype(np.float64)
        b = self.expected(key).astype(np.float64)
        assert a.shape == b.shape, (key, a.shape, b.shape)
        floor = m["f32_vs_f64"]
        return {
            "max_abs": float(np.abs(a - b).max()),
            "rel_l2": float(np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-300)),
            "floor_rel_l2": floor[1] if floor else None,
        }

    def check(self, key, array, rel_l2):
        r = self.compare(key, array)
        assert r["rel_l2"] <= rel_l2, (key, r, rel_l2)
        return r
