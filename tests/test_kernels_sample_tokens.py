"""sample_tokens: every implementation gives the same integers as the sorts of the reference."""

import math

import pytest
import torch
from kernels_testing import Guarded, poisoned_allocations
from sampling_cases import sampling_cases

from mimdet.kernels import KernelUnavailableError
from mimdet.kernels.registry import can_run_cpp
from mimdet.kernels.sample_tokens import ops
from mimdet.kernels.sample_tokens.api import sample_tokens

CASES = sampling_cases(4200)
needs_cpp = pytest.mark.skipif(can_run_cpp("cpu", torch.float32) is not None, reason="no C++ kernels here")
IMPLS = ["eager", pytest.param("cpp", marks=needs_cpp)]


@pytest.fixture(autouse=True)
def _poisoned():
    with poisoned_allocations():
        yield


def plainly(noise, valid, ratio):
    """The definition, with Python's sort."""
    length = noise.shape[1]
    count = min(length, max(1, int(length * ratio)))
    keep, drop = [], []
    for row, inside in zip(noise.tolist(), valid.tolist(), strict=True):
        value = [v if ok else math.inf for v, ok in zip(row, inside, strict=True)]
        order = sorted(range(length), key=lambda i: (math.isnan(value[i]), 0.0 if value[i] != value[i] else value[i]))
        keep.append(sorted(order[:count]))
        drop.append(sorted(order[count:]))
    keep = torch.tensor(keep, dtype=torch.int64).view(len(noise), count)
    return keep, torch.tensor(drop, dtype=torch.int64).view(len(noise), length - count)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, impl):
    noise, valid, ratio = CASES[case]
    sample = sample_tokens(noise, valid, ratio, impl=impl)
    keep, drop = plainly(noise, valid, ratio)
    assert torch.equal(sample.keep, keep)
    assert torch.equal(sample.drop, drop)
    together = torch.cat([keep, drop], dim=1)
    assert torch.equal(together.gather(1, sample.restore), torch.arange(noise.shape[1]).expand(noise.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_noise_of_other_dtypes(dtype):
    noise = torch.rand(2, 500).to(dtype)
    valid = torch.rand(2, 500) > 0.2
    for got, want in zip(sample_tokens(noise, valid, 0.5), sample_tokens(noise, valid, 0.5, impl="eager"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_reads_and_writes_nothing_else(impl):
    noise, valid = Guarded(torch.rand(3, 257)), torch.ones(3, 257, dtype=torch.bool)
    sample_tokens(noise.tensor, valid, 0.5, impl=impl)
    noise.check()


@pytest.mark.parametrize("impl", IMPLS)
def test_noise_that_wants_a_gradient(impl):
    sample = sample_tokens(torch.rand(1, 9, requires_grad=True), torch.ones(1, 9, dtype=torch.bool), 0.5, impl=impl)
    assert not any(t.requires_grad for t in sample)


@pytest.mark.usefixtures("two_threads")
def test_threads_change_nothing():
    noise, valid = torch.rand(16, 4200), torch.rand(16, 4200) > 0.3
    got, want = sample_tokens(noise, valid, 0.5), sample_tokens(noise, valid, 0.5, impl="eager")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("count", [1, 7, 10])
def test_opcheck(count):
    noise, valid = torch.rand(2, 10), torch.rand(2, 10) > 0.5
    torch.library.opcheck(ops.run, (noise, valid, count, "cpp"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(impl, dynamic):
    torch._dynamo.reset()
    # Inductor's own code is not what is tested, and slow to make.
    backend = "aot_eager" if impl == "eager" else "inductor"
    compiled = torch.compile(
        lambda n, v: sample_tokens(n, v, 0.3, impl=impl), fullgraph=True, dynamic=dynamic, backend=backend
    )
    for length in (64, 93):
        noise, valid = torch.rand(2, length), torch.rand(2, length) > 0.2
        for got, want in zip(compiled(noise, valid), sample_tokens(noise, valid, 0.3, impl="eager"), strict=True):
            assert torch.equal(got, want)


def test_meta_tensors():
    noise, valid = torch.rand(2, 10, device="meta"), torch.ones(2, 10, dtype=torch.bool, device="meta")
    shapes = [tuple(t.shape) for t in ops.run(noise, valid, 4, "cpp")]
    assert shapes == [(2, 4), (2, 6), (2, 10)]


@pytest.mark.parametrize(
    ("noise", "valid", "ratio", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), 0.5, TypeError, "noise must be"),
        (torch.rand(2, 3), torch.ones(2, 3), 0.5, TypeError, "valid must be bool"),
        (torch.rand(2, 3), torch.ones(2, 4, dtype=torch.bool), 0.5, ValueError, r"\(2, 3\) and \(2, 4\)"),
        (torch.rand(6), torch.ones(6, dtype=torch.bool), 0.5, ValueError, r"must both be \(B, L\)"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool, device="meta"), 0.5, ValueError, "valid is on meta"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.0, ValueError, "ratio must be"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), 1.5, ValueError, "ratio must be"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), math.nan, ValueError, "ratio must be"),
    ],
    ids=["integer-noise", "float-valid", "sizes", "rank", "devices", "ratio-0", "ratio-above-1", "ratio-nan"],
)
def test_bad_input(noise, valid, ratio, error, message):
    with pytest.raises(error, match=message):
        sample_tokens(noise, valid, ratio)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_what_cannot_run_says_why(impl):
    with pytest.raises(KernelUnavailableError, match=f"sample_tokens: {impl} cannot run: "):
        sample_tokens(torch.rand(1, 4), torch.ones(1, 4, dtype=torch.bool), 0.5, impl=impl)
