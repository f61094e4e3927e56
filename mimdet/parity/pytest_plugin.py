"""``pytest --mimdet-parity``: the cases of ``mimdet parity`` as tests of any project.

Without the option nothing is imported but this file.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NAME = "mimdet-parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of their own group."""
    group = parser.getgroup("mimdet", "numerical parity of mimdet's implementations")
    group.addoption("--mimdet-parity", action="store_true", help="also run the cases of mimdet parity as tests")
    group.addoption(
        "--mimdet-parity-level",
        choices=("quick", "default", "full"),
        default="default",
        help="how many of them, as mimdet parity has --quick and --full",
    )
    group.addoption("--mimdet-parity-device", choices=("cpu", "cuda"), help="where; default: all devices")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the cases before -k and -m choose among the tests."""
    if config.getoption("--mimdet-parity"):
        items.extend(Cases.from_parent(session, name=NAME, nodeid=NAME).collect())


class Cases(pytest.Collector):
    """All cases of the level that can run here."""

    def collect(self) -> list[pytest.Item]:
        """One test for each case."""
        from ..testing import RecordingError
        from .cases import BadUseError, select
        from .run import Interpreter

        options = self.config.getoption
        try:
            cases, _ = select(
                options("--mimdet-parity-level"), device=options("--mimdet-parity-device"), original=_original()
            )
        except (BadUseError, RecordingError, FileNotFoundError) as error:
            raise pytest.UsageError(f"--mimdet-parity: {error}") from None
        interpreter = Interpreter()
        self.config.add_cleanup(interpreter.close)
        return [CaseItem.from_parent(self, name=case.id, case=case, interpreter=interpreter) for case in cases]


class CaseItem(pytest.Item):
    """A case; it fails with one line."""

    def __init__(self, *, case, interpreter, **options) -> None:
        super().__init__(**options)
        self.case, self.interpreter = case, interpreter
        self.add_marker(pytest.mark.mimdet_parity)

    def runtest(self) -> None:
        """Measure it; its numbers become properties of the test in --junit-xml."""
        from .run import FAILED, run_case

        result = self.interpreter.run(self.case) if self.case.interpreted else run_case(self.case, _original())
        for name in ("tensor", "error", "budget", "reference_error", "ulp"):
            self.user_properties.append((name, getattr(result, name)))
        if result.status == FAILED:
            raise CaseFailedError(result.message)

    def repr_failure(self, excinfo, style=None):
        """The message of a failed case, without a traceback."""
        if isinstance(excinfo.value, CaseFailedError):
            return f"{self.case.id}: {excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        """Where it is, for reports."""
        return self.path, None, f"{NAME}: {self.name}"


def _original() -> Path | None:
    """The checkout of the original that the environment names."""
    return Path(os.environ["MIMDET_ORIGINAL"]) if os.environ.get("MIMDET_ORIGINAL") else None


class CaseFailedError(Exception):
    """A case is above its budget, or raised an error."""


def pytest_configure(config: pytest.Config) -> None:
    """Announce the marker: ``-m mimdet_parity`` runs these cases alone."""
    config.addinivalue_line("markers", "mimdet_parity: a case of mimdet parity")
