"""Settings of every test run."""

import os

# Test processes share the cores; threads of several would wait for one another. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
