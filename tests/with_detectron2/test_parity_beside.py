"""The cases of ``mimdet parity`` that need Detectron2, and those of the checkout that ``MIMDET_ORIGINAL`` names."""

import os
from pathlib import Path

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from mimdet.parity.cases import select


@pytest.mark.parametrize("what", ["losses", "detections"])
@pytest.mark.parametrize("other", ["detectron2", "original"])
def test_beside(other, what):
    original = os.environ.get("MIMDET_ORIGINAL")
    if other == "original" and not original:
        pytest.skip("MIMDET_ORIGINAL is not set")
    checkout = Path(original) if original else None
    (case,) = select(only=f"{other}-auto-cpu-fp32-contiguous-{what}-forward", device="cpu", original=checkout)[0]
    for result in case.measure(checkout):
        result.check()
