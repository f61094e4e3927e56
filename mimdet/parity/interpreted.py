"""``python -m mimdet.parity.interpreted``: cases from stdin, results to stdout, one JSON object a line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from dataclasses import asdict


def main() -> None:
    """Answer until stdin ends."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from ..testing import interpreter
    from .cases import parse
    from .run import run_case

    # NumPy warns of lanes that the kernels mask.
    warnings.simplefilter("ignore", RuntimeWarning)
    interpreter.patch()
    for line in sys.stdin:
        values = asdict(run_case(parse(json.loads(line))))
        values.pop("case")
        print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    # The parent tells of Ctrl-C; if it is gone, nobody reads the answers.
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        main()
