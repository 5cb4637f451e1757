#!/usr/bin/env bash
# Runs the quick tests on other versions than the lock's, in environments that uv makes, and prints a row for each:
#     bash tests/versions.sh                                     # the whole table
#     bash tests/versions.sh 3.13:2.15 3.12:2.14:train-cuda12    # Python : torch : extra that brings DALI
# All but torch is the newest in pyproject.toml's ranges. VERSIONS_DIR (default: a temporary folder) gets one environment of
# 6 GB at a time, and keeps a log of each. Exits with 1 where one fails, after all were tried.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
table=(3.11:2.11 3.12:2.12 3.12:2.13 3.11:2.14 3.13:2.15 3.11:2.15:train-cuda12)
# Training, launching over ranks, scoring, exporting, predicting, and what lies under them.
quick=(tests/data/test_augment.py tests/data/test_pipeline.py tests/kernels/test_bce_dice.py tests/models/test_encoder.py
    tests/models/test_models.py tests/serving/test_export.py tests/serving/test_predict.py tests/test_doctor.py
    tests/scoring/test_evaluation.py tests/training/test_launch.py)
folder=${VERSIONS_DIR:-$(mktemp -d)}
mkdir -p "$folder"
[ $# -gt 0 ] && table=("$@")

try() { # python, torch, extra: builds an environment and runs the tests in it
    uv venv --quiet --clear --no-python-downloads --python "$1" "$folder/environment" &&
        uv pip install --quiet --python "$folder/environment" -e ".[$3,zero,dicom,onnx,cluster,test]" "torch==$2.*" &&
        "$folder/environment/bin/distseg" doctor train &&
        PATH=$folder/environment/bin:$PATH TORCH_EXTENSIONS_DIR=$folder/environment/extensions \
            "$folder/environment/bin/python" -m pytest -m "not slow" -n 2 --dist loadfile -p no:cacheprovider "${quick[@]}"
}

versions() { # of the environment: a cell for each
    "$folder/environment/bin/python" - <<'PYTHON'
import platform
from importlib.metadata import distributions
found = {d.name.lower().replace("_", "-"): d.version for d in distributions()}
dali = next((name.removeprefix("nvidia-") + " " + found[name] for name in sorted(found) if "nvidia-dali" in name), "none")
print(platform.python_version(), *(found.get(name, "none") for name in ("torch", "torchvision", "triton")), dali, sep=" | ")
PYTHON
}

status=0
echo "| Python | torch | torchvision | Triton | DALI | doctor | quick tests | minutes |"
echo "|---|---|---|---|---|---|---|---|"
for row in "${table[@]}"; do
    IFS=: read -r python torch extra <<<"$row"
    log=$folder/$python-$torch-${extra:=train}.log
    start=$SECONDS
    try "$python" "$torch" "$extra" >"$log" 2>&1 || status=1
    doctor=$(grep -o '^train  *ready' "$log" >/dev/null && echo ready || echo "not ready")
    tests=$(grep -oE '^=+ .*(passed|failed|error).* in ' "$log" | tail -n 1 | sed 's/^=* //; s/ in $//')
    echo "| $(versions) | $doctor | ${tests:-none: see $log} | $(((SECONDS - start + 30) / 60)) |"
    rm -rf "$folder/environment"
done
exit "$status"
