#!/usr/bin/env bash
# The whole gate: style, types, layers, tests, then the slow ones. Words after it go to pytest: `bash tests/run.sh -k plan`.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_venv.sh dev

ruff check .
ruff format --check .
mypy
lint-imports
pytest "$@"
if [ $# -eq 0 ]; then
    pytest -m slow
fi
