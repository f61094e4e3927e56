"""Configs: loading, interpolation, overrides, and the round trip through YAML."""

import functools
import re
import textwrap
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from support.paths import CONFIGS
from torch import nn

from mimdet.config import LazyCall, from_yaml, instantiate, load, to_yaml
from mimdet.config.lazy import resolve_target

CONFIGS = CONFIGS


@pytest.fixture
def tree(tmp_path):
    """A config two folders down that imports relatively; folder names that are no identifiers."""
    deep = tmp_path / "a-b.c" / "sub"
    deep.mkdir(parents=True)
    (tmp_path / "common.py").write_text("train = dict(max_iter=3, steps=[1, 2])\n")
    (deep / "model.py").write_text(
        textwrap.dedent(
            """
            from functools import partial
            from torch import nn
            from mimdet.config import LazyCall as L
            from ...common import train

            _private = dict(a=1)
            model = L(nn.Linear)(in_features=3, out_features="${train.max_iter}")
            norms = dict(part=partial(nn.LayerNorm, eps=1e-5), eps=1e-3,
                         whole=L(nn.LayerNorm)(normalized_shape=4, eps="${..eps}"))
            """
        )
    )
    return deep / "model.py"


def test_relative_imports_and_interpolation(tree):
    cfg = load(tree)
    assert set(cfg) == {"train", "model", "norms"}
    assert instantiate(cfg.model).weight.shape == (3, 3)
    assert instantiate(cfg.norms)["whole"].eps == 1e-3


def test_each_load_is_fresh(tree):
    load(tree).train.max_iter = 99
    assert load(tree).train.max_iter == 3


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=7", "train.max_iter", 7),
        ("train.steps=[4,5]", "train.steps", [4, 5]),
        ("train.steps.1=9", "train.steps", [1, 9]),
        ("norms.eps=8e-5", "norms.eps", 8e-5),
        ("model.bias=false", "model.bias", False),
        ("train.max_iter=null", "train.max_iter", None),
        ("train.max_iter=a=b", "train.max_iter", "a=b"),
        ("train.max_iter='5'", "train.max_iter", "5"),
        ("train.max_iter='8e-5'", "train.max_iter", "8e-5"),
        ("train.max_iter=+.5", "train.max_iter", 0.5),
        ("train.max_iter=2024-01-05", "train.max_iter", "2024-01-05"),
        ("train.steps=[1e3,x]", "train.steps", [1000.0, "x"]),
        ("train.max_iter=/data/\udcc3\udca9 1", "train.max_iter", "/data/\udcc3\udca9 1"),
        ('train.max_iter="/data/\\ud83d\\ude00"', "train.max_iter", "/data/\U0001f600"),
    ],
)
def test_override(tree, override, key, value):
    actual = OmegaConf.select(load(tree, [override]), key)
    assert actual == value
    assert type(actual) is type(value) or isinstance(value, list)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("train.max_itr=1", KeyError, "did you mean 'train.max_iter'"),
        ("trian.max_iter=1", KeyError, "did you mean 'train.max_iter'"),
        ("model.in_feature=2", KeyError, "did you mean 'model.in_features'"),
        ("train.steps.5=2", KeyError, "list of 2"),
        ("train.max_iter.x=1", KeyError, "plain value"),
        ("train.max_iter", ValueError, "key=value"),
        ("train.max_iter=[1", ValueError, "not valid YAML"),
        ("train.max_iter=!!python/name:os.system", ValueError, "not valid YAML"),
        ("train.max_iter=${b", ValueError, r"override 'train\.max_iter=\$\{b': no viable alternative"),
        ("train.steps={[1, 2]: 3}", ValueError, "override 'train.steps=.*not valid YAML"),
    ],
)
def test_bad_override(tree, override, error, message):
    with pytest.raises(error, match=message):
        load(tree, [override])


def test_a_path_of_a_locale_without_utf_8_survives_yaml(tree, tmp_path):
    """Python decodes such bytes to lone surrogates (surrogateescape), which open the file."""
    cfg = load(tree, ["train.max_iter=/data/\udcc3\udca9"])
    saved = tmp_path / "saved.yaml"
    saved.write_bytes(to_yaml(cfg).encode("ascii"))
    assert from_yaml(saved.read_text()).train.max_iter == "/data/\udcc3\udca9"


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("mimdet_b_mask_rcn", "did you mean 'mimdet_b_mask_rcnn'? "),
        ("configs/mimdet_b_maskrcnn.py", "did you mean 'mimdet_b_mask_rcnn'? "),
        ("table3_grid", "did you mean 'ablations/table3_grid'? "),
        ("demo.yaml", "did you mean 'demo'? "),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_unknown_file_names_the_nearest_and_all_shipped_configs(path, hint):
    with pytest.raises(FileNotFoundError) as caught:
        load(path)
    first, *lines = str(caught.value).splitlines()
    assert first == f"no config file {path!r}; {hint}shipped with mimdet:"
    assert [line.strip() for line in lines if line.endswith(":")] == [
        "detectors:", "demo:", "ablations:", "detectron2:", "detectron2/ablations:"
    ]  # fmt: skip
    names = [name for line in lines if not line.endswith(":") for name in line.split()]
    shipped = [p.relative_to(CONFIGS).with_suffix("") for p in CONFIGS.rglob("*.py")]
    assert sorted(names) == sorted(p.as_posix() for p in shipped if p.parts[0] != "common")
    assert max(map(len, lines)) < 110


def test_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("configs/mimdet_b_mask_rcnn.py").model.roi_heads.num_classes == 80
    assert load("mimdet_l_mask_rcnn").optimizer.params.multiplier == 3.5


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_every_shipped_config_builds_and_survives_yaml(path, tmp_path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(load(path)))
    with torch.device("meta"):
        models = [instantiate(load(source).model) for source in (path, saved)]
    first, second = ({k: v.shape for k, v in m.state_dict().items()} for m in models)
    assert first == second
    for source in (path, saved):
        multiplier = instantiate(load(source).lr_multiplier)
        assert 0 <= multiplier(0.0) <= multiplier(0.5) <= 1


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("torch.optim.adamw.AdamW", torch.optim.AdamW),
        ("torch.nn.LayerNorm", nn.LayerNorm),
        ("torch.nn.LayerNorm.forward", nn.LayerNorm.forward),
        ("pathlib.Path.home", Path.home),
    ],
)
def test_targets_are_resolved_by_module_and_attributes(name, target):
    assert resolve_target(name) == target


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such", r"no callable 'no\.such'"),
        ("torch.optim.adamw.Adamm", "no callable"),
        ("torch.optim", "no callable"),
        ("torch.__version__", "no callable"),
        ("LayerNorm", "no callable"),
        (".LayerNorm", "no callable"),
        ("", "no callable ''"),
        (5, "no callable 5"),
        ("broken_module.f", "module broken_module fails with ZeroDivisionError: division by zero"),
        ("needy_module.f", "module needy_module needs no_such_package"),
    ],
)
def test_targets_that_cannot_be_found_are_named(name, message, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "needy_module.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=message):
        resolve_target(name)


def test_syntax_error_names_file_and_line(tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\ny = = 2\n")
    with pytest.raises(ValueError, match=r"bad\.py, line 2"):
        load(tmp_path / "bad.py")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("train = dict(a=1)\ny = 1 / 0\n", ValueError, r"bad\.py, line 2: ZeroDivisionError: division by zero$"),
        ("\nimport no_such_package\n", ImportError, r"bad\.py, line 2: No module named 'no_such_package'$"),
        ("from .nothing import train\n", ImportError, r"bad\.py, line 1: No module named 'nothing'$"),
        ("train = dict(a=undefined)\n", ValueError, r"bad\.py, line 1: NameError: name 'undefined' is not defined$"),
        ("x = {}\nx['key']\n", ValueError, r"bad\.py, line 2: KeyError: key$"),
        ("from .inner import x\n", ValueError, r"inner\.py, line 3: ZeroDivisionError"),
        ("from .inner import f\n\nf()\n", ValueError, r"inner\.py, line 3: ZeroDivisionError"),
        ("import json\njson.loads('{')\n", ValueError, r"bad\.py, line 2: JSONDecodeError: Expecting"),
        ("open('/no/such/file')\n", ValueError, r"bad\.py, line 1: FileNotFoundError"),
        ("train = dict(a='${b')\n", ValueError, r"bad\.py: train: GrammarParseError: .* full_key: a"),
        ("x = '\0'\n", ValueError, r"bad\.py.*null bytes"),
    ],
)
def test_an_error_in_a_config_names_file_and_line(tmp_path, text, error, message):
    (tmp_path / "inner.py").write_text("def f(): pass\n\n1 / 0\n")
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(error, match=message) as caught:
        load(tmp_path / "bad.py")
    assert str(caught.value).startswith(f"config {tmp_path}")
    assert "_mimdet_config_" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff", "utf-8"), (b"[1", "not valid YAML"), (b"a: {b: '${c'}", "full_key: a.b"), (b"5", "not a YAML mapping")],
)
def test_a_bad_yaml_file_is_named(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "bad.yaml")
    assert str(caught.value).startswith(f"config {tmp_path / 'bad.yaml'}: ")


def test_yaml_round_trip_builds_the_same(tree, tmp_path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(load(tree, ["train.max_iter=5"])))
    built = instantiate(from_yaml(saved.read_text()))
    assert built["model"].out_features == 5
    assert isinstance(built["norms"]["part"], functools.partial)
    assert built["norms"]["part"](4).eps == 1e-5
    assert to_yaml(from_yaml(saved.read_text())) == saved.read_text()


def test_yaml_keeps_bare_callables(tmp_path):
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(OmegaConf.create({"norm": nn.LayerNorm}, flags={"allow_objects": True})))
    assert instantiate(from_yaml(saved.read_text()))["norm"](4).normalized_shape == (4,)


def test_yaml_refuses_what_has_no_name():
    with pytest.raises(ValueError, match="cannot be saved by name"):
        to_yaml(OmegaConf.create({"f": lambda c: c}, flags={"allow_objects": True}))


@pytest.mark.parametrize("text", ["[1, 2]", "a: [1"], ids=["list", "broken"])
def test_yaml_that_is_no_config(text):
    with pytest.raises(ValueError, match="YAML"):
        from_yaml(text)


def test_wrong_argument_names_the_callable():
    with pytest.raises(TypeError, match="while building Linear"):
        instantiate(LazyCall(nn.Linear)(in_features=1, out=2))


def test_extra_arguments_win():
    assert instantiate(LazyCall(nn.Linear)(in_features=1, out_features=2), out_features=3).out_features == 3


def test_target_by_name():
    assert isinstance(instantiate({"_target_": "torch.nn.Identity"}), torch.nn.Identity)
    with pytest.raises(ImportError, match=r"no\.such"):
        instantiate({"_target_": "no.such"})


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("a.0.prob=2", ValueError),
        ("a.0.prob=x", TypeError),
        ("b.max_size=-5", ValueError),
        ("b.max_size=x", ValueError),
    ],
)
def test_a_refused_argument_names_the_key(tmp_path, override, error):
    text = "a = [L(RandomFlip)(prob=0.5)]\nb = L(ResizeShortestEdge)(short_edge_length=8, max_size=None)"
    (tmp_path / "c.py").write_text(
        f"from mimdet.config import LazyCall as L\nfrom mimdet.data import RandomFlip, ResizeShortestEdge\n{text}\n"
    )
    key = override.partition("=")[0].rpartition(".")[0]
    with pytest.raises(error, match=rf"\(config key {re.escape(key)}[,)]"):
        instantiate(load(tmp_path / "c.py", [override]))


def test_tuples_of_detectron2s_yaml_are_read_and_no_other_tag():
    assert list(from_yaml("betas: !!python/tuple [0.9, 0.999]").betas) == [0.9, 0.999]
    for tag in ("tuple a", "name:os.system ''", "object/new:tuple [[1]]", "object/apply:os.system [ls]"):
        with pytest.raises(ValueError, match="not valid YAML"):
            from_yaml(f"betas: !!python/{tag}")
