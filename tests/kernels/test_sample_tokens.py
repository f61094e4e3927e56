"""sample_tokens: every implementation gives the same integers as a stable sort."""

import itertools
import math

import pytest
import torch
from support.kernels import IMPLS, INTERPRETED, needs_compiler

from mimdet.kernels import sample_packed_tokens, sample_tokens, valid_mask
from mimdet.kernels.sample_tokens import ops, reference
from mimdet.testing import plain

OP = "sample_tokens"
pytestmark = pytest.mark.usefixtures("poisoned")


def sampling_cases(longest):
    """name -> (noise, valid_mask, ratio); ``longest`` tokens at most."""
    generator = torch.Generator().manual_seed(3)

    def uniform(batch, length):
        return torch.rand(batch, length, generator=generator)

    def everything(noise):
        return torch.ones_like(noise, dtype=torch.bool)

    cases = {}
    for length in (1, 2, 31, 32, 33, 255, 256, 257, 1023, 1025, 4200):
        if length <= longest:
            noise = uniform(3, length)
            cases[f"uniform-{length}"] = noise, everything(noise), 0.5
    length = min(longest, 777)
    noise = uniform(3, length)
    for ratio in (0.001, 0.125, 0.3, 0.7, 0.999, 1.0):
        cases[f"ratio-{ratio}"] = noise, everything(noise), ratio
    few = (noise * 3).floor() / 4
    cases["heavy-ties"] = few, everything(few), 0.5
    equal = torch.full_like(noise, 0.25)
    cases["all-equal"] = equal, everything(equal), 0.4
    cases["all-zero"] = torch.zeros_like(noise), everything(noise), 0.4
    cases["all-padding"] = noise, torch.zeros_like(noise, dtype=torch.bool), 0.5
    holes = uniform(3, length) > torch.tensor([[0.9], [0.5], [0.1]])
    cases["padding"] = noise, holes, 0.5
    cases["padding-and-ties"] = few, holes, 0.5
    cases["one-valid"] = noise, torch.arange(length).expand(3, -1) == length - 1, 0.5
    # Noise is in [0, 1), but any float must be ordered as argsort does.
    positive = torch.tensor([0.0, 1e-45, 1.0, 3e38, torch.inf, torch.nan])
    special = torch.cat([positive, -positive])
    strange = special[torch.randint(len(special), (3, length), generator=generator)]
    for ratio in (0.1, 0.5, 0.9):
        cases[f"strange-{ratio}"] = strange, holes, ratio
    cases["transposed"] = uniform(length, 3).t(), uniform(length, 3).t() > 0.3, 0.5
    cases["no-images"] = noise[:0], holes[:0], 0.5
    cases["no-tokens"] = noise[:, :0], holes[:, :0], 0.5
    return cases


def packed_cases():
    """name -> (noise, sizes, grid, ratio) for tokens of images of several sizes."""
    generator = torch.Generator().manual_seed(4)
    grid = 9, 31
    noise = torch.rand(4, 9 * 31, generator=generator)
    sizes = [(9, 31), (1, 1), (5, 30), (9, 2)]
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5])
    strange = special[torch.randint(len(special), noise.shape, generator=generator)]
    return {
        "sizes": (noise, sizes, grid, 0.5),
        "at-least-one": (noise, sizes, grid, 0.001),
        "everything": (noise, sizes, grid, 1.0),
        "ties": ((noise * 3).floor(), sizes, grid, 0.3),
        # Valid tokens come before padding, whatever their noise.
        "strange": (strange, sizes, grid, 0.9),
        "no-images": (noise[:0], [], grid, 0.5),
    }


CASES = sampling_cases(257 if INTERPRETED else 4200)
PACKED = packed_cases()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_is_the_definition(case, impl):
    noise, valid, ratio = CASES[case]
    for actual, expected in zip(
        sample_tokens(noise, valid, ratio, impl=impl), plain.sample_tokens(noise, valid, ratio), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", PACKED)
def test_packed_is_each_image_alone(case, impl):
    noise, sizes, grid, ratio = PACKED[case]
    sample = sample_packed_tokens(noise, sizes, grid, ratio, impl=impl)
    keep, drop, lengths = [], [], []
    tokens = torch.arange(noise.numel()).view(-1, *grid)
    for row, mine, (height, width) in zip(noise, tokens, sizes, strict=True):
        cropped = row.view(grid)[:height, :width].reshape(1, -1)
        split = plain.sample_tokens(cropped, torch.ones_like(cropped, dtype=torch.bool), ratio)
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


@pytest.mark.parametrize(
    ("noise", "valid", "ratio", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool), 0.5, TypeError, "noise must be"),
        (torch.rand(2, 3), torch.ones(2, 3), 0.5, TypeError, "valid_mask must be bool"),
        (torch.rand(2, 3), torch.ones(2, 4, dtype=torch.bool), 0.5, ValueError, r"\(2, 3\) and \(2, 4\)"),
        (torch.rand(6), torch.ones(6, dtype=torch.bool), 0.5, ValueError, r"noise must be \(B, L\), got \(6,\)"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), 0.0, ValueError, "ratio must be"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), 1.5, ValueError, "ratio must be"),
        (torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool), math.nan, ValueError, "ratio must be"),
    ],
    ids=["integer-noise", "float-valid", "sizes", "rank", "ratio-0", "ratio-above-1", "ratio-nan"],
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
