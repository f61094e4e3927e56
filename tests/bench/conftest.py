"""``mimdet bench`` as a fixture, with fixed machine limits."""

import sys

import pytest

from mimdet.bench import session
from mimdet.cli import main

LIMITS = {"copy_gb_s": 10.0, "gemm_float32_tflop_s": 0.1, "gemm_bfloat16_tflop_s": 0.2}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(session, "measure_limits", lambda device, dtypes: LIMITS)
    return LIMITS


@pytest.fixture
def bench(monkeypatch):
    """Run ``mimdet bench words...``; its exit status."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mimdet", "bench", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0

    return run
