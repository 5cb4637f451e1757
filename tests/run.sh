#!/usr/bin/env bash
# The whole gate: style, types, layers, tests, then the slow ones. Words after it go to pytest: `bash tests/run.sh -k plan`.
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
two=(-n 2 --dist loadfile) # two files of tests at a time
pytest "${two[@]}" "$@"
if [ $# -eq 0 ]; then
    pytest "${two[@]}" -m slow
fi
