#!/usr/bin/env bash
# The main job, end to end, on real models and real text, on a CPU:  bash scripts/quickstart.sh
# Everything after the set-up is scripts/quickstart.py, which takes --teacher, --student, --corpus and more (--help).
#   VENV             where the environment lives (default .venv; reused when it is there)
#   TEACH_ONCE_HOME  where models and text are cached (default ~/.cache/teach-once)
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}

[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
"$VENV/bin/python" -m pip install -q -c scripts/constraints.txt '.[student,demo]'
exec "$VENV/bin/python" scripts/quickstart.py "$@"
