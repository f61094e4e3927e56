"""The table of implementations says what really runs, and the choice among them follows its rules."""

import importlib
import threading

import pytest
import torch

from mimdet import kernels
from mimdet.kernels import KernelUnavailableError, build, registry, table, use
from mimdet.kernels.selector import requested

CALLS = {
    "add_layer_norm": lambda f, **k: f(torch.ones(1, 3, 8), torch.ones(1, 3, 8), None, *_affine(), 1e-6, **k),
    "attention_varlen": lambda f, **k: f(
        *(torch.ones(4, 1, 8) for _ in range(3)), torch.tensor([0, 4], dtype=torch.int32), 4, **k
    ),
    "bias_gelu": lambda f, **k: f(torch.ones(3, 8), torch.ones(8), **k),
    "gather_add_pos": lambda f, **k: f(torch.ones(1, 4, 8), torch.ones(4, 8), torch.tensor([[0, 2]]), **k),
    "group_norm_gelu": lambda f, **k: f(torch.ones(1, 8, 2, 2), *_affine(), 1e-6, **k),
    "layer_norm_gelu": lambda f, **k: f(torch.ones(1, 8, 2, 2), *_affine(), 1e-6, **k),
    "sample_tokens": lambda f, **k: f(torch.rand(1, 8), torch.ones(1, 8, dtype=torch.bool), 0.5, **k),
    "scatter_fill": lambda f, **k: f(
        torch.ones(1, 2, 8), torch.ones(1, 2, 8), torch.tensor([[0, 2, 1, 3]]), torch.ones(4, 8), **k
    ),
}
# The C++ of the others is our own; attention's is PyTorch's, which is always there.
OURS = [op for op in CALLS if op != "attention_varlen"]


def _affine():
    return torch.ones(8), torch.zeros(8)


def call(op, **kwargs):
    return CALLS[op](getattr(importlib.import_module(f"mimdet.kernels.{op}.api"), op), **kwargs)


@pytest.fixture
def ran(monkeypatch):
    """Names that C++ was called with."""
    names = []
    original = build.call_cpp

    def call_cpp(name, *arguments):
        names.append(name)
        original(name, *arguments)

    monkeypatch.setattr(build, "call_cpp", call_cpp)
    return names


def test_every_operation_is_listed_and_called_here():
    assert {row.op for row in table()} == set(kernels.OPS) == set(CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_rows_are_what_runs(op, ran):
    rows = [row for row in table("cpu") if row.op == op]
    assert sum(row.chosen for row in rows) == 1
    assert "eager" in [row.impl for row in rows]
    for row in rows:
        ran.clear()
        if row.usable:
            call(op, impl=row.impl)
            assert bool(ran) == (row.impl == "cpp" and op in OURS), row
        else:
            with pytest.raises(KernelUnavailableError, match=f"{op}: {row.impl} cannot run"):
                call(op, impl=row.impl)
    ran.clear()
    call(op, impl="auto")
    assert bool(ran) == (op in OURS and any(row.chosen and row.impl == "cpp" for row in rows))


def test_argument_before_context_before_environment(monkeypatch):
    monkeypatch.delenv("MIMDET_KERNELS", raising=False)
    assert requested() == "auto"
    monkeypatch.setenv("MIMDET_KERNELS", "eager")
    assert requested() == "eager"
    with use("cpp"):
        assert requested() == "cpp"
        with use("triton"):
            assert requested() == "triton"
            assert requested("cuda") == "cuda"
        assert requested() == "cpp"
    assert requested() == "eager"


def test_context_belongs_to_its_thread(monkeypatch):
    monkeypatch.delenv("MIMDET_KERNELS", raising=False)
    seen = []
    with use("eager"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_words_name_where_they_came_from(monkeypatch):
    with pytest.raises(ValueError, match="impl: 'fast' is not an implementation"):
        requested("fast")
    with pytest.raises(ValueError, match=r"mimdet\.kernels\.use: 'fast'"), use("fast"):
        pass
    monkeypatch.setenv("MIMDET_KERNELS", "fast")
    with pytest.raises(ValueError, match="MIMDET_KERNELS: 'fast'"):
        requested()


def test_only_auto_falls_back(monkeypatch):
    monkeypatch.setattr(build, "cpp_unavailable", lambda: "no C++ compiler found")
    for op in OURS:
        assert registry.choose(op, "auto", "cpu", torch.float32) == "eager"
        call(op, impl="auto")
        with pytest.raises(KernelUnavailableError):
            call(op, impl="cpp")


def test_info_shows_the_table():
    from mimdet import info

    rows, notes = info.kernels()
    shown = {(*row[:2], impl): state for row in rows for impl, state in zip(info.KERNELS, row[2:], strict=True)}
    listed = {(row.op, row.device, row.impl): row for row in table()}
    assert set(listed) == {place for place, state in shown.items() if state != "-"}
    for place, row in listed.items():
        if row.usable:
            assert shown[place] == ("chosen" if row.chosen else "yes")
        else:
            assert row.reason == notes[int(shown[place].removeprefix("no (").removesuffix(")")) - 1]


@pytest.mark.parametrize(("impl", "device"), [("triton", "cpu"), ("cuda", "cpu"), ("cpp", "cuda")])
def test_reasons_name_the_remedy(impl, device):
    can_run = getattr(registry, f"can_run_{impl}")
    for dtype, words in ((torch.float32, "(move them, or use "), (torch.float64, "(use eager, or float32")):
        assert words in can_run(device, dtype)
