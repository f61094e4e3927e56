"""Experiments, one file each: ``run`` measures and writes rows; ``columns``, ``title`` and ``draw`` are views of rows.

A module has the name of its rows' experiment:

- ``columns(rows)``: the columns of its tables, see ``views``; for a terminal and for Markdown.
- ``published(rows)``, where it exists: the rows that a Markdown page shows.
- ``draw(rows)``: a matplotlib figure.
"""

from importlib import import_module
from types import ModuleType


def of(experiment: str) -> ModuleType:
    """The module of a row's experiment.

    Raises:
        ValueError: this version has no such experiment.
    """
    try:
        return import_module(f".{experiment}", __name__)
    except ModuleNotFoundError:
        raise ValueError(f"no experiment {experiment!r} in this version of mimdet") from None
