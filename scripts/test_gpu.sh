#!/usr/bin/env bash
# The tests that need a CUDA device; CI without one never collects them. Run from anywhere: bash scripts/test_gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m pytest -c tests/gpu/pytest.ini --rootdir tests/gpu --confcutdir tests/gpu -p no:cacheprovider tests/gpu "$@"
