import copy
import json

import pytest
import torch
from support.paths import RECORDINGS
from torch import nn

from mimdet.config import LazyCall
from mimdet.engine import get_fpn_model_parameters
from mimdet.engine.optim import build_optimizer

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


def optimizer_section(**arguments):
    params = LazyCall(get_fpn_model_parameters)(base_lr=1e-2)
    return LazyCall(torch.optim.AdamW)(params=params, lr=1e-2, weight_decay=0.1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "scaled", "fused"),
    [({}, False, True), ({}, True, None), ({"foreach": True}, False, None), ({"fused": False}, False, False)],
    ids=["plain", "float16", "foreach", "not fused"],
)
def test_adamw_is_fused_unless_it_cannot_be(arguments, scaled, fused):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    expected = copy.deepcopy(model)
    optimizer = build_optimizer(optimizer_section(**arguments), model, scaled)
    assert {group["fused"] for group in optimizer.param_groups} == {fused}
    reference = torch.optim.AdamW(
        get_fpn_model_parameters(expected, base_lr=1e-2), lr=1e-2, weight_decay=0.1, fused=False
    )
    x = torch.randn(3, 5)
    for module, update in ((model, optimizer), (expected, reference)):
        for _ in range(3):
            update.zero_grad()
            module(x).square().sum().backward()
            update.step()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
