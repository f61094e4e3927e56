"""Cascade and RetinaNet against Detectron2's own classes on equal weights, recorded and, if installed, live."""

import numpy as np
import pytest
from support.detectron2_heads import OURS, THEIRS, TRAINING, recorded


@pytest.fixture(params=["ours", "theirs"])
def answer(request):
    """Outputs of an implementation; Detectron2's check the recordings."""
    if request.param == "theirs":
        pytest.importorskip("detectron2", reason="Detectron2 is not installed to run beside")
    return OURS if request.param == "ours" else THEIRS


@pytest.mark.parametrize("case", TRAINING)
@pytest.mark.parametrize("kind", OURS)
def test_losses_and_gradients(answer, kind, case):
    actual = answer[kind](case)
    for name, value in recorded(kind, case, actual).items():
        # Rounding switches ReLUs near 0, which limits the precision of gradients.
        tolerance = {"rtol": 1e-3, "atol": 1e-6} if name.startswith("grad.") else {"rtol": 1e-5, "atol": 1e-9}
        np.testing.assert_allclose(actual[name], value, err_msg=name, **tolerance)


@pytest.mark.parametrize("kind", OURS)
def test_detections(answer, kind):
    actual = answer[kind]("eval")
    for name, value in recorded(kind, "eval", actual).items():
        assert len(value) > 5, "too few detections to compare"
        scale = 1e-6 * max(1.0, float(np.abs(value).max())) if name.endswith("boxes") else 0
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-4 + scale, err_msg=name)
