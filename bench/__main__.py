"""``python -m mimdet.bench`` is ``mimdet bench``."""

import sys

from ..cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
