#!/usr/bin/env bash
# Everything worth measuring on a GPU, from a checkout that is not installed; kernels are compiled at first use.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m mimdet bench gpu "$@"
