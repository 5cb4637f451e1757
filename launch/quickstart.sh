#!/usr/bin/env bash
# The main job, from nothing: phantom volumes, store, training on all GPUs or on two CPU ranks, scores, model, a mask.
# QUICKSTART_OUT names another output folder than ./quickstart. A second run starts over in it. In a checkout it sets up the
# environment and works in the checkout's root; that of an installed distseg runs in the active one, where it is called.
set -euo pipefail
launch_files=$(cd "$(dirname "$0")" && pwd)
if [ -f "$launch_files/../pyproject.toml" ]; then
    cd "$launch_files/.."
    . launch/setup_venv.sh train
fi

out=${QUICKSTART_OUT:-quickstart}
step() { printf '\n== %s\n' "$*"; "$@"; }

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
    launch=(accelerate launch --config_file "$launch_files/gpu.yaml" --num_processes "$gpus")
else
    launch=(accelerate launch --config_file "$launch_files/cpu.yaml" --num_processes 2)
fi

rm -rf "$out/phantom" "$out/store" "$out/run" "$out/model" "$out/masks"
mkdir -p "$out"
step distseg phantom "$out/phantom" --cases 15 --size 160 --slices 24
step distseg prepare "$out/phantom" "$out/store" --folds 4 --test-patients 3
step "${launch[@]}" --module distseg.train --config quickstart \
    "data.store=$out/store" "output_dir=$out/run"
step distseg evaluate "$out/run" --split val
step distseg evaluate "$out/run" --split test
step distseg export "$out/run" "$out/model"
step distseg predict "$out/model" "$out/phantom/COVID-19-CT-Seg_20cases/phantom_001.nii.gz" "$out/masks/phantom_001.nii.gz"
step distseg report "$out/run"

cat <<SUMMARY

Done. The scores per region are above (a whole volume without infection scores 0 for any false alarm).
  report  $out/run/report.html
  model   $out/model/model.pt (described in $out/model/model.json)
  mask    $out/masks/phantom_001.nii.gz
SUMMARY
