"""MAE checkpoints with the keys and shapes of the recordings."""

import json

import numpy as np
import torch
from support.fill_weights import gradient, tensor_for
from support.paths import RECORDINGS

META = json.loads((RECORDINGS / "mae_load.json").read_text())


def fake_mae():
    state = {}
    for key, shape in META["fake_checkpoint"]["keys"].items():
        value = 0.5 * gradient(900 + len(key), shape) if key.endswith("pos_embed") else tensor_for("mae." + key, shape)
        state[key] = torch.from_numpy(np.asarray(value, np.float32))
    return state


def saved(path, state):
    torch.save({"model": state}, path)
    return str(path)
