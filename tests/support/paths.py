"""Where the tests find things."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TESTS = ROOT / "tests"
RECORDINGS = TESTS / "recordings"  # of the original MIMDet, of Detectron2 and of earlier versions
