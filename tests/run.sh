#!/usr/bin/env bash
# The whole gate: style, types, layers, tests. Words after it go to pytest: `bash tests/run.sh -m "not slow"` leaves out what
# takes minutes, `bash tests/run.sh -k plan` runs what has to do with plans, `--shuffle 1` runs all in a random order.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup_venv.sh dev
bash launch/setup_triton.sh
# Headless Chromium looks at the pages of `distseg report`; without it those tests are skipped and say so.
if ! hash chromium chromedriver 2>/dev/null && [ "$(id -u)" = 0 ] && [ -f /etc/debian_version ]; then
    (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        chromium chromium-driver) >/dev/null || echo "tests: chromium could not be installed; no browser looks at the report" >&2
fi
# What export/cpp is built with; without it those tests are skipped and say so.
cpp="g++ cmake make libnifti-dev nlohmann-json3-dev libcurl4-openssl-dev"
if [ "$(id -u)" = 0 ] && [ -f /etc/debian_version ] && ! dpkg -s $cpp >/dev/null 2>&1; then
    (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        $cpp) >/dev/null || echo "tests: $cpp could not be installed; export/cpp is not built" >&2
fi

ruff check .
ruff format --check .
mypy
lint-imports
# Two files of tests at a time, the longest first (tests/conftest.py); the dearest tests are told at the end.
pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 "$@"
