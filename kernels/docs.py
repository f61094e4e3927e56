"""The support table of docs/kernels.md: ``python -m mimdet.kernels.docs docs/kernels.md`` writes it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .dispatch import dtype_name, operations

_PLACE = re.compile(r"(<!-- kernels -->\n).*?(<!-- end of kernels -->)", re.DOTALL)


def support_table() -> str:
    """Markdown: for every operation its implementations, in auto's order, and what each takes."""
    lines = ["| operation | implementation | device | dtypes | shapes |", "|---|---|---|---|---|"]
    for op, operation in operations().items():
        for name, impl in operation.implementations.items():
            dtypes = ", ".join(map(dtype_name, impl.dtypes)) or "all"
            lines.append(f"| `{op}` | {name} | {impl.device} | {dtypes} | {impl.limits or 'all'} |")
    return "\n".join(lines) + "\n"


def fill(text: str) -> str:
    """``text`` with the table between its marks.

    Raises:
        ValueError: the marks are not there.
    """
    if not _PLACE.search(text):
        raise ValueError("no place for the table: <!-- kernels --> and <!-- end of kernels --> on lines of their own")
    return _PLACE.sub(lambda place: place[1] + support_table() + place[2], text)


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
