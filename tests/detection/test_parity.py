"""The whole detector against recordings of the original on Detectron2: the model's cases of ``mimdet parity``."""

import pytest

from mimdet.parity.cases import select

CASES = [
    case
    for case in select("full", "-auto-cpu-fp32-", device="cpu")[0]
    if case.op in ("backbone", "losses", "detections") and case.id != "losses-auto-cpu-fp32-contiguous-polygons-forward"
]
# How many tensors a case compares at least.
LEAST = {
    ("backbone", "forward"): 4,
    ("backbone", "backward"): 120,
    ("losses", "backward"): 45,
    ("detections", "forward"): 3,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.size}-{case.direction}")
def test_within_tolerances(case):
    results = case.measure()
    for result in results:
        result.check()
    assert len(results) >= LEAST[case.op, case.direction]


def test_all_recordings_of_the_detector_are_compared():
    compared = {(case.op, case.size) for case in CASES}
    assert {size for op, size in compared if op == "backbone"} == {f"ratio{r}" for r in (0.25, 0.5, 0.75, 1.0)}
    truth = {"polygons", "bitmasks", "one_empty", "two_parts", "all_empty"}
    assert {size for op, size in compared if op == "losses"} == truth
    sizes = {"ratio0.5", "ratio1.0", "image1:300x600", "image0:337x480"}
    assert {size for op, size in compared if op == "detections"} == sizes
