#!/usr/bin/env bash
# Writes the lock again, with uv: requirements-dev.txt (the extra dev: what the gate installs) and, at the same versions,
# requirements.txt (the extras train and dicom: what launch/quickstart.sh installs). A version stays while pyproject.toml
# allows it; words go to uv: `bash tests/lock.sh --upgrade-package timm`.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() {
    uv pip compile pyproject.toml --group build --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --no-annotate --custom-compile-command "bash tests/lock.sh" --quiet "$@"
}
lock --extra dev --output-file requirements-dev.txt "$@"
rm requirements.txt # its versions come from the other
lock --extra train --extra dicom --constraints requirements-dev.txt --output-file requirements.txt
