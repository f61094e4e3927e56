import json

import pytest
import torch
from support.paths import RECORDINGS
from torch import nn

from mimdet.engine import get_fpn_model_parameters

GROUPS = json.loads((RECORDINGS / "optim_groups.json").read_text())


def module_with(shapes, frozen=()):
    """A module on the meta device whose parameters have exactly these dotted names and shapes."""
    root = nn.Module()
    for name, shape in [*shapes, *frozen]:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        trainable = (name, shape) not in frozen
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta"), requires_grad=trainable))
    return root


@pytest.mark.parametrize("name", ["mimdet_b", "mimdet_l"])
def test_groups_are_those_of_the_original(name):
    golden = GROUPS[name]
    shapes = [(key, shape) for key, shape, *_ in golden["params"]]
    model = module_with(shapes, [tuple(entry) for entry in golden["frozen"]])
    groups = get_fpn_model_parameters(
        model,
        weight_decay=0.1,
        weight_decay_norm=0.0,
        base_lr=golden["base_lr"],
        skip_list=("pos_embed", "decoder_pos_embed"),
        multiplier=golden["multiplier"],
    )
    assert [len(group["params"]) for group in groups] == golden["group_sizes"]
    where = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
    by_name = dict(model.named_parameters())
    for key, _, index, multiple, decay in golden["params"]:
        group = groups[where[id(by_name[key])]]
        assert where[id(by_name[key])] == index, key
        assert group["lr"] == pytest.approx(multiple * golden["base_lr"], rel=1e-12), key
        assert group["weight_decay"] == decay, key
    torch.optim.AdamW(groups, lr=golden["base_lr"])


@pytest.mark.parametrize(
    ("name", "shape", "decay"),
    [
        ("head.weight", (3, 4), 0.1),
        ("head.bias", (3,), 0.0),
        ("head.table.bias", (3, 4), 0.0),
        ("head.scale", (3,), 0.0),
        ("head.embed", (1, 3, 4), 0.0),
        ("head.norm.weight", (3, 4), 0.02),
    ],
    ids=["matrix", "vector-bias", "matrix-named-bias", "vector", "skipped", "matrix-in-norm"],
)
def test_decay_rule(name, shape, decay):
    model = module_with([(name, shape)])
    (group,) = get_fpn_model_parameters(
        model, weight_decay=0.1, weight_decay_norm=0.02, base_lr=1.0, skip_list=["head.embed"], multiplier=2.0
    )
    assert (group["weight_decay"], group["lr"]) == (decay, 2.0)


def test_norm_decay_none_means_as_any_other():
    (group,) = get_fpn_model_parameters(module_with([("norm.weight", (3, 4))]), weight_decay=0.1)
    assert group["weight_decay"] == 0.1


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable parameter"):
        get_fpn_model_parameters(module_with([], [("pos_embed", (1, 2))]))
