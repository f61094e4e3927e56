"""The table of implementations equals what runs, and auto's choice follows its rules."""

import subprocess
import sys
import threading

import pytest
import torch

from mimdet import kernels
from mimdet.kernels import KernelUnavailableError, build, dispatch, library, table, use
from mimdet.kernels.dispatch import Call, requested
from mimdet.testing.op_cases import case

# Attention's C++ is PyTorch's, which is always there.
OURS = [op for op in kernels.OPS if op != "attention_varlen"]


@pytest.fixture
def ran(monkeypatch):
    """Names that C++ was called with."""
    names = []
    original = library.launch

    def launch(name, impl, *arguments, **options):
        if impl == "cpp":
            names.append(name)
        original(name, impl, *arguments, **options)

    monkeypatch.setattr(library, "launch", launch)
    return names


def test_every_operation_is_listed():
    assert {row.op for row in table()} == set(kernels.OPS)


@pytest.mark.parametrize("op", kernels.OPS)
def test_rows_are_what_runs(op, ran):
    example = case(op, batch=1)  # sequences of one length, which every implementation takes
    rows = [row for row in table("cpu") if row.op == op]
    assert sum(row.chosen for row in rows) == 1
    assert "eager" in [row.impl for row in rows]
    for row in rows:
        ran.clear()
        if row.usable:
            example(row.impl)
            assert bool(ran) == (row.impl == "cpp" and op in OURS), row
        else:
            with pytest.raises(KernelUnavailableError, match=f"{op}: {row.impl} cannot run"):
                example(row.impl)
    ran.clear()
    example("auto")
    assert bool(ran) == (op in OURS and any(row.chosen and row.impl == "cpp" for row in rows))


@pytest.fixture
def environment(monkeypatch):
    """Sets MIMDET_KERNELS; None deletes it."""

    def change(value):
        monkeypatch.setenv("MIMDET_KERNELS", value) if value else monkeypatch.delenv("MIMDET_KERNELS", raising=False)
        dispatch.forget()

    yield change
    monkeypatch.undo()
    dispatch.forget()


def test_argument_before_context_before_environment(environment):
    environment(None)
    assert requested() == "auto"
    environment("eager")
    assert requested() == "eager"
    with use("cpp"):
        assert requested() == "cpp"
        with use("triton"):
            assert requested() == "triton"
            assert requested("cuda") == "cuda"
        assert requested() == "cpp"
    assert requested() == "eager"


def test_context_belongs_to_its_thread(environment):
    environment(None)
    seen = []
    with use("eager"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_words_name_where_they_came_from(environment):
    with pytest.raises(ValueError, match="impl: 'fast' is not an implementation"):
        case("bias_gelu")("fast")
    with pytest.raises(ValueError, match=r"mimdet\.kernels\.use: 'fast'"), use("fast"):
        pass
    environment("fast")
    with pytest.raises(ValueError, match="MIMDET_KERNELS: 'fast'"):
        case("bias_gelu")()


@pytest.fixture
def _fresh():
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.mark.usefixtures("_fresh")
def test_only_auto_falls_back(monkeypatch):
    monkeypatch.setattr(build, "cpp_unavailable", lambda: "no C++ compiler found")
    for op in OURS:
        assert dispatch.resolve(op, "auto", torch.device("cpu"), (torch.float32,)) == "eager"
        case(op)("auto")
        with pytest.raises(KernelUnavailableError, match=r"no C\+\+ compiler found\. auto would choose eager"):
            case(op)("cpp")


@pytest.mark.usefixtures("_fresh")
def test_auto_probes_no_slower_implementation(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch, "no_gpu", lambda *args, **kwargs: None)
    monkeypatch.setattr(dispatch, "too_old", lambda *args: None)
    for look in ("cuda_unavailable", "cpp_unavailable"):
        monkeypatch.setattr(build, look, lambda: pytest.fail("a library was looked for"))
    for op in OURS:
        assert dispatch.resolve(op, "auto", torch.device("cuda"), (torch.float32,)) == "triton"


@pytest.mark.usefixtures("_fresh")
def test_a_call_is_resolved_once(monkeypatch):
    asked = []
    monkeypatch.setattr(dispatch, "_resolve", lambda *arguments: asked.append(arguments) or "eager")
    for word in ("auto", "auto", "eager"):
        with use(word):
            dispatch.resolve("bias_gelu", None, torch.device("cpu"), (torch.float32,))
    assert [word for _, _, word, _ in asked] == ["auto", "eager"]


def test_a_mix_of_dtypes_that_cuda_has_no_kernel_for(monkeypatch):
    monkeypatch.setattr(dispatch, "supports_cuda", lambda call: None)
    impl = dispatch.operations()["add_layer_norm"].implementations["cuda"]
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for dtypes, taken in (((f32, bf16, f32), True), ((bf16,) * 3, True), ((bf16, f32, bf16), False),
                          ((f32, bf16, f16), False)):  # fmt: skip
        assert (impl.refusal(Call(torch.device("cuda"), dtypes)) is None) == taken, dtypes


def test_flat_names_are_the_functions_whatever_is_imported_first():
    script = (
        "import sys, mimdet.kernels as kernels\n"
        "assert 'torch' not in sys.modules\n"
        "import mimdet.kernels.bias_gelu.ops, mimdet.kernels.add_layer_norm\n"
        "from mimdet.kernels import bias_gelu, add_layer_norm, sample_packed_tokens\n"
        "import mimdet.kernels.scatter_fill.reference, mimdet.kernels.add_layer_norm.ops\n"
        "from mimdet.kernels.bias_gelu import ops\n"
        "assert ops.NAME == 'bias_gelu'\n"
        "for name in kernels.__all__[1:]:\n"
        "    assert callable(getattr(kernels, name)), name\n"
        "    assert name in dir(kernels)\n"
        "assert kernels.add_layer_norm is add_layer_norm\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_info_shows_the_table():
    from mimdet import info

    rows, notes = info.kernels()
    shown = {(*row[:2], impl): state for row in rows for impl, state in zip(info.KERNELS, row[2:], strict=True)}
    limits = info.kernel_limits()
    assert ("add_layer_norm", "triton, cuda", "at most 8192 channels") in limits
    assert {row.limits for row in table() if row.limits} == {words for _, _, words in limits}
    listed = {(row.op, row.device, row.impl): row for row in table()}
    assert set(listed) == {place for place, state in shown.items() if state != "-"}
    for place, row in listed.items():
        if row.usable:
            assert shown[place] == ("chosen" if row.chosen else "yes")
        else:
            assert row.reason == notes[int(shown[place].removeprefix("no (").removesuffix(")")) - 1]


@pytest.mark.parametrize(("impl", "device"), [("triton", "cpu"), ("cuda", "cpu"), ("cpp", "cuda")])
def test_reasons_name_the_remedy(impl, device):
    implementation = dispatch.standard()[impl]
    for dtype, words in ((torch.float32, "(move them, or use "), (torch.float64, "(use eager, or float32")):
        assert words in implementation.refusal(Call(torch.device(device), (dtype,)))
