"""``mimdet`` as on the command line."""

import sys

import pytest

from mimdet.cli import main


def run(monkeypatch, *argv):
    """Exit status of ``mimdet argv...``."""
    monkeypatch.setattr(sys, "argv", ["mimdet", *map(str, argv)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code or 0
