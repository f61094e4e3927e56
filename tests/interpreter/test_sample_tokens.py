"""The Triton kernel of sample_tokens under the interpreter."""

import pytest
import torch
from kernels_testing import Guarded
from sampling_cases import packed_cases, sampling_cases

from mimdet.kernels.sample_tokens import ops
from mimdet.kernels.sample_tokens import triton as kernels
from mimdet.kernels.sample_tokens.api import sample_packed_tokens, sample_tokens

CASES, PACKED = sampling_cases(257), packed_cases()


@pytest.fixture
def _small_blocks(monkeypatch):
    # Several blocks a picture, without long pictures.
    monkeypatch.setattr(kernels, "_BLOCK", 128)


def check(function, case):
    got, want = function(*case, impl="triton"), function(*case, impl="eager")
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_same_integers(case):
    check(sample_tokens, CASES[case])


@pytest.mark.parametrize("case", PACKED)
def test_packed_same_integers(case):
    check(sample_packed_tokens, PACKED[case])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("case", ["uniform-255", "uniform-257", "ratio-1.0", "padding-and-ties", "strange-0.5"])
def test_same_integers_from_several_blocks(case):
    check(sample_tokens, CASES[case])


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("case", ["ties", "strange"])
def test_packed_same_integers_from_several_blocks(case):
    check(sample_packed_tokens, PACKED[case])


def test_nothing_to_keep():
    split = ops.run(torch.rand(2, 9), torch.ones(2, 9, dtype=torch.bool), None, 0, 9, "triton")
    assert torch.equal(split[1], torch.arange(9).expand(2, 9))
    assert torch.equal(split[2], split[1])


@pytest.mark.parametrize("length", [255, 256, 257])
def test_reads_nothing_else(length):
    noise = Guarded(torch.rand(2, length))
    sample = sample_tokens(noise.tensor, torch.ones(2, length, dtype=torch.bool), 0.5, impl="triton")
    noise.check()
    assert sample.restore.max() == length - 1
