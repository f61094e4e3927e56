"""Deterministic weights and inputs: those of the recordings.

Every value depends only on a state_dict key and its shape (weights) or on an
integer seed (inputs), so two implementations whose state_dict keys agree get
bit-identical float32 tensors without any weight file.

    from mimdet.testing.weights import fill_module, image, noise
    fill_module(model)                      # in place, float32
    img = image(seed=1, h=200, w=300)       # uint8-valued float32, (3, h, w), RGB
    u = noise(seed=7, n=2, length=280)      # distinct values in (0, 1), (n, length)

Only numpy is needed for the values; torch is imported lazily by fill_module.
"""

import math
import zlib

import numpy as np

# Keys left as the model itself computes them.
LEFT_ALONE = ("pos_embed", "relative_position_index")

# (suffix, gain): overrides of the default gain 1.0 for tensors of rank >= 2.
# The prediction layers are sharpened / damped so that detections are spread
# out and proposals stay close to their anchors.
GAINS = (
    ("objectness_logits.weight", 1.5),
    ("anchor_deltas.weight", 0.15),
    ("cls_score.weight", 3.0),
    ("bbox_pred.weight", 0.7),
    ("mask_head.predictor.weight", 2.0),
    ("mask_head.deconv.weight", 2.0),
    # RetinaNet only: every level gets logits and deltas of similar size.
    ("head.cls_score.weight", 0.55),
    ("head.bbox_pred.weight", 0.1),
    ("top_block.p6.weight", 8.0),
    ("top_block.p7.weight", 5.0),
)

# (suffix, shift): added to a bias. RetinaNet's classification prior.
SHIFTS = (("head.cls_score.bias", -4.0),)


def _rng(seed):
    return np.random.Generator(np.random.PCG64(seed))


def tensor_for(key, shape):
    """float32 array for one state_dict entry, or None to leave it alone."""
    shape = tuple(int(s) for s in shape)
    leaf = key.rsplit(".", 1)[-1]
    if any(leaf.endswith(s) for s in LEFT_ALONE):
        return None
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.float32)
    z = _rng(zlib.crc32(key.encode("utf-8"))).standard_normal(shape, dtype=np.float64)
    if leaf == "running_mean":
        v = 0.1 * z
    elif leaf == "running_var":
        v = 1.0 + 0.1 * np.abs(z)
    elif leaf == "bias" or leaf.endswith("_bias"):
        v = 0.1 * z + sum(b for suffix, b in SHIFTS if key.endswith(suffix))
    elif leaf == "relative_position_bias_table":
        v = 0.5 * z
    elif len(shape) <= 1:
        v = 1.0 + 0.1 * z
    else:
        gain = 1.0 if len(shape) == 2 else math.sqrt(2.0)
        for suffix, g in GAINS:
            if key.endswith(suffix):
                gain = g
        v = z * (gain / math.sqrt(math.prod(shape[1:])))
    return np.asarray(v, np.float32)


def fill_module(module):
    """Fill a torch module in place; returns the list of keys left alone."""
    import torch

    left = []
    with torch.no_grad():
        for key, t in module.state_dict().items():
            v = tensor_for(key, t.shape)
            if v is None:
                left.append(key)
            else:
                t.copy_(torch.from_numpy(v).reshape(t.shape))
    return left


def image(seed, h, w):
    """Synthetic RGB image, integer values 0..255 as float32, shape (3, h, w)."""
    r = _rng(seed)

    def blocks(s):
        a = r.integers(0, 256, size=(3, -(-h // s), -(-w // s)), dtype=np.int64)
        return np.repeat(np.repeat(a, s, 1), s, 2)[:, :h, :w]

    a = (4 * blocks(32) + 2 * blocks(8) + blocks(1)) // 7
    return a.astype(np.float32)


def noise(seed, n, length):
    """(n, length) float32 in (0, 1), no two equal inside a row."""
    r = _rng(seed)
    rows = [(r.permutation(length).astype(np.float64) + 0.5) / length for _ in range(n)]
    return np.stack(rows).astype(np.float32)


def gradient(seed, shape):
    """Fixed upstream gradient: standard normal, float32."""
    return _rng(seed).standard_normal(tuple(shape), dtype=np.float64).astype(np.float32)


def polygons(seed, h, w, count):
    """`count` instances: list of (polygon [x0,y0,x1,y1,...], class in 0..79).

    Star-convex 10-gons; the instance box is the polygon's bounding box."""
    r = _rng(seed)
    out = []
    for _ in range(count):
        rad = r.uniform(0.12, 0.30) * min(h, w)
        cy = r.uniform(rad + 2, h - rad - 2)
        cx = r.uniform(rad + 2, w - rad - 2)
        ang = np.arange(10) * (2 * np.pi / 10)
        rr = rad * r.uniform(0.55, 1.0, size=10)
        pts = np.stack([cx + rr * np.cos(ang), cy + rr * np.sin(ang)], 1)
        pts = np.round(pts * 8) / 8  # exact in float32
        out.append((pts.reshape(-1).tolist(), int(r.integers(0, 80))))
    return out


# First values for fixed keys and seeds: if these differ, numpy's stream has
# changed and every golden is void.
EXPECT = {
    "a.weight": [-0.3759986460208893, -0.6490788459777832, 0.12344420701265335],
    "a.running_var": [1.1097991466522217, 1.036721110343933, 1.0105012655258179],
    "image": [168.0, 173.0, 147.0],
    "noise": [0.8500000238418579, 0.44999998807907104, 0.75],
}


def self_check():
    actual = {
        "a.weight": tensor_for("a.weight", (2, 3)).reshape(-1)[:3].tolist(),
        "a.running_var": tensor_for("a.running_var", (3,)).tolist(),
        "image": image(1, 5, 5)[0, 0, :3].tolist(),
        "noise": noise(1, 1, 10)[0, :3].tolist(),
    }
    assert actual == EXPECT, (actual, EXPECT)


if __name__ == "__main__":
    self_check()
    print("ok")
