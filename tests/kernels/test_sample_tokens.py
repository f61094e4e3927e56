"""sample_tokens: every implementation gives the same integers as Python's sort."""

import itertools
import math

import pytest
import torch
from support.kernels import IMPLS, INTERPRETED, Guarded, needs_compiler
from support.sampling_cases import packed_cases, sampling_cases

from mimdet.kernels import sample_packed_tokens, sample_tokens, valid_mask
from mimdet.kernels.sample_tokens import ops, reference

OP = "sample_tokens"
CASES = sampling_cases(257 if INTERPRETED else 4200)
PACKED = packed_cases()
pytestmark = pytest.mark.usefixtures("poisoned")


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
    assert torch.equal(sample.ids_keep, keep)
    assert torch.equal(sample.ids_mask, drop)
    together = torch.cat([keep, drop], dim=1)
    assert torch.equal(together.gather(1, sample.ids_restore), torch.arange(noise.shape[1]).expand(noise.shape))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", PACKED)
def test_packed_is_each_image_alone(case, impl):
    noise, sizes, grid, ratio = PACKED[case]
    sample = sample_packed_tokens(noise, sizes, grid, ratio, impl=impl)
    keep, drop, lengths = [], [], []
    tokens = torch.arange(noise.numel()).view(-1, *grid)
    for row, mine, (height, width) in zip(noise, tokens, sizes, strict=True):
        cropped = row.view(grid)[:height, :width].reshape(1, -1)
        split = plainly(cropped, torch.ones_like(cropped, dtype=torch.bool), ratio)
        numbers = mine[:height, :width].flatten()
        keep.append(numbers[split[0][0]]), drop.append(numbers[split[1][0]])
        lengths.append(len(keep[-1]))
    kept, dropped = (torch.cat([tokens.flatten()[:0], *parts]) for parts in (keep, drop))
    assert torch.equal(sample.ids_keep, kept)
    assert torch.equal(sample.ids_mask, dropped)
    ids_restore = torch.full((noise.numel(),), -1)
    ids_restore[torch.cat([kept, dropped])] = torch.arange(len(kept) + len(dropped))
    assert torch.equal(sample.ids_restore, ids_restore.view_as(noise))
    assert sample.cu_keep.dtype == torch.int32
    assert sample.cu_keep.tolist() == [0, *itertools.accumulate(lengths)]
    assert sample.max_keep == max(lengths, default=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_without_padding_is_the_canvas(impl):
    noise = torch.rand(3, 60)
    canvas = sample_tokens(noise, torch.ones(3, 60, dtype=torch.bool), 0.3, impl=impl)
    packed = sample_packed_tokens(noise, [(6, 10)] * 3, (6, 10), 0.3, impl=impl)
    first = 60 * torch.arange(3)[:, None]
    assert torch.equal(packed.ids_keep.view(3, -1) - first, canvas.ids_keep)
    assert torch.equal(packed.ids_mask.view(3, -1) - first, canvas.ids_mask)
    rows = torch.cat([packed.ids_keep, packed.ids_mask])[packed.ids_restore]
    assert torch.equal(rows, torch.arange(180).view(3, 60))


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_to_keep(impl):
    # The public functions never keep nothing; the operation must still write nowhere else.
    noise, valid = torch.rand(2, 9), torch.ones(2, 9, dtype=torch.bool)
    everything = torch.arange(9).expand(2, 9)
    split = reference.sample_tokens(noise, valid, 0) if impl == "eager" else ops.run(noise, valid, None, 0, 9, impl)
    assert split[0].shape == (2, 0)
    assert torch.equal(split[1], everything)
    assert torch.equal(split[2], everything)


def test_valid_mask():
    sizes, expected = [(2, 1), (1, 3)], [[[True, False, False]] * 2, [[True] * 3, [False] * 3]]
    assert valid_mask(sizes, (2, 3)).tolist() == valid_mask(torch.tensor(sizes), (2, 3)).tolist() == expected
    assert valid_mask([], (2, 3)).shape == (0, 2, 3)
    with pytest.raises(ValueError, match=r"valid_mask: sizes\[1\] is \(0, 3\), not within 1 .. \(2, 3\)"):
        valid_mask([(1, 1), (0, 3)], (2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_noise_of_other_dtypes(dtype):
    noise = torch.rand(2, 500).to(dtype)
    valid = torch.rand(2, 500) > 0.2
    for actual, expected in zip(
        sample_tokens(noise, valid, 0.5), sample_tokens(noise, valid, 0.5, impl="eager"), strict=True
    ):
        assert torch.equal(actual, expected)


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
    actual, expected = sample_tokens(noise, valid, 0.5), sample_tokens(noise, valid, 0.5, impl="eager")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="Triton alone has blocks")
@pytest.mark.parametrize("case", ["uniform-255", "uniform-257", "ratio-1.0", "padding-and-ties", "strange-0.5"])
def test_several_blocks(runner, monkeypatch, case):
    from mimdet.kernels.sample_tokens import triton

    monkeypatch.setattr(triton, "_BLOCK", 128)
    test_is_the_definition(case, runner[0])


@pytest.mark.skipif(not INTERPRETED, reason="Triton alone has blocks")
@pytest.mark.parametrize("case", ["ties", "strange"])
def test_packed_in_several_blocks(runner, monkeypatch, case):
    from mimdet.kernels.sample_tokens import triton

    monkeypatch.setattr(triton, "_BLOCK", 128)
    test_packed_is_each_image_alone(case, runner[0])


@pytest.mark.parametrize("count", [1, 7, 10])
def test_opcheck(cpp, count):
    noise, valid = torch.rand(2, 10), torch.rand(2, 10) > 0.5
    torch.library.opcheck(torch.ops.mimdet.sample_tokens.default, (noise, valid, None, count, 10 - count, "cpp"))


def test_opcheck_packed(cpp):
    valid = valid_mask([(1, 4), (2, 5)], (2, 5)).flatten(1)
    offsets = torch.tensor([[0, 2, 7], [0, 2, 7]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.mimdet.sample_tokens.default, (torch.rand(2, 10), valid, offsets, 7, 7, "cpp"))


def test_packed_compiles_as_one_graph(cpp):
    torch._dynamo.reset()
    run = torch.compile(
        lambda n, sizes: sample_packed_tokens(n, sizes, (6, 10), 0.3, impl="cpp"), fullgraph=True, backend="aot_eager"
    )
    for sizes in ([(6, 10), (2, 3)], [(4, 4), (5, 9)]):
        noise = torch.rand(2, 60)
        for actual, expected in zip(run(noise, sizes), sample_packed_tokens(noise, sizes, (6, 10), 0.3), strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))


def test_meta_tensors():
    noise, valid = torch.rand(2, 10, device="meta"), torch.ones(2, 10, dtype=torch.bool, device="meta")
    shapes = [tuple(t.shape) for t in ops.run(noise, valid, None, 4, 6, "cpp")]
    assert shapes == [(2, 4), (2, 6), (2, 10)]
    offsets = torch.empty(2, 3, dtype=torch.int32, device="meta")
    shapes = [tuple(t.shape) for t in ops.run(noise, valid, offsets, 7, 5, "cpp")]
    assert shapes == [(7,), (5,), (2, 10)]


@pytest.mark.parametrize(
    ("noise", "valid", "ratio", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), 0.5, TypeError, "noise must be"),
        (torch.rand(2, 3), torch.ones(2, 3), 0.5, TypeError, "valid_mask must be bool"),
        (torch.rand(2, 3), torch.ones(2, 4, dtype=torch.bool), 0.5, ValueError, r"\(2, 3\) and \(2, 4\)"),
        (torch.rand(6), torch.ones(6, dtype=torch.bool), 0.5, ValueError, r"noise must be \(B, L\), got \(6,\)"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool, device="meta"), 0.5, ValueError, "valid_mask is on meta"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.0, ValueError, "ratio must be"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), 1.5, ValueError, "ratio must be"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), math.nan, ValueError, "ratio must be"),
    ],
    ids=["integer-noise", "float-valid", "sizes", "rank", "devices", "ratio-0", "ratio-above-1", "ratio-nan"],
)
def test_bad_input(noise, valid, ratio, error, message):
    with pytest.raises(error, match=message):
        sample_tokens(noise, valid, ratio)


@pytest.mark.parametrize(
    ("noise", "sizes", "error", "message"),
    [
        (torch.ones(2, 6, dtype=torch.int64), [(1, 1)] * 2, TypeError, "noise must be"),
        (torch.rand(2, 6), [(1, 1)], ValueError, r"noise must be \(1, 6\) for the sizes, got \(2, 6\)"),
        (torch.rand(2, 7), [(1, 1)] * 2, ValueError, r"noise must be \(2, 6\) for the sizes, got \(2, 7\)"),
        (torch.rand(2, 6), [(1, 1), (0, 3)], ValueError, r"sizes\[1\] is \(0, 3\), not within 1 .. \(2, 3\)"),
        (torch.rand(2, 6), [(1, 4), (1, 1)], ValueError, r"sizes\[0\] is \(1, 4\), not within 1 .. \(2, 3\)"),
    ],
    ids=["integer-noise", "images", "tokens", "empty-image", "larger-than-the-grid"],
)
def test_bad_packed_input(noise, sizes, error, message):
    with pytest.raises(error, match=message):
        sample_packed_tokens(noise, sizes, (2, 3), 0.5)


@needs_compiler
@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("packed", [False, True], ids=["canvas", "packed"])
@pytest.mark.parametrize("length", [1, 1200, 4200, 16384])
def test_compiles_within_the_budget(capability, length, packed):
    from support.aot import compile_pair

    noise = torch.rand(2, length)
    if packed:
        run = lambda: sample_packed_tokens(noise, [(1, length)] * 2, (1, length), 0.5, impl="triton")  # noqa: E731
    else:
        run = lambda: sample_tokens(noise, noise < 0.9, 0.5, impl="triton")  # noqa: E731
    (one,) = compile_pair(OP, capability, run)
    assert one.stack == 0, one
    # One program per image: occupancy does not matter.
    assert one.registers <= 128, one
