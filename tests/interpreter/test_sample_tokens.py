"""The Triton kernel of sample_tokens under the interpreter."""

import pytest
import torch
from kernels_testing import Guarded
from sampling_cases import sampling_cases

from mimdet.kernels.sample_tokens import triton as kernels
from mimdet.kernels.sample_tokens.api import sample_tokens

CASES = sampling_cases(257)


@pytest.fixture
def _small_blocks(monkeypatch):
    # Several blocks a picture, without long pictures.
    monkeypatch.setattr(kernels, "_BLOCK", 128)


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("case", CASES)
def test_same_integers(case):
    noise, valid, ratio = CASES[case]
    got = sample_tokens(noise, valid, ratio, impl="triton")
    want = sample_tokens(noise, valid, ratio, impl="eager")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("length", [255, 256, 257])
def test_reads_nothing_else(length):
    noise = Guarded(torch.rand(2, length))
    sample = sample_tokens(noise.tensor, torch.ones(2, length, dtype=torch.bool), 0.5, impl="triton")
    noise.check()
    assert sample.restore.max() == length - 1
