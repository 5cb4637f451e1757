"""What a field of view unlike the training's costs: slices scaled to one side in pixels, beside slices at one size in mm.

    python tests/benchmarks/field_of_view.py STORE [--runs FOLDER] [--quick]

Trains the quickstart's model twice on the quickstart's store (`launch/quickstart.sh` makes it), as it is (resize) and with
data.spacing_mm, where a pixel is as large as the first one sees it (spacing). Both score the validation and test volumes, each
padded with air or cropped around the middle until its field of view is 0.8 to 2 times its own. Dice is pooled over all voxels. A
run that FOLDER holds is not trained again.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from report import print_result, print_table, print_versions

from distseg.config import AIR_HU
from distseg.data.store import Case, Store, open_store
from distseg.runs.folder import open_run
from distseg.runs.trained import load_best
from distseg.scoring.segmenting import segment_volume

FACTORS = (0.8, 1.0, 1.25, 1.5, 2.0)
IMAGE_SIZE = 128  # of the quickstart
ALLOWED = 0.02  # of Dice
TARGETS = {f"spacing, infection at {factor:g} - at 1": f">= -{ALLOWED}" for factor in FACTORS if factor > 1}
CPU = torch.device("cpu")


def main() -> int:
    args = parse_arguments()
    print_versions(["torch", "timm"])
    torch.set_num_threads(1)
    store = open_store(args.store)
    cases = [case for split in ("val", "test") for case in store.cases_of(split, 0)]
    with tempfile.TemporaryDirectory() as work:
        runs = {arm: train(arm, store, args.runs or Path(work), args.quick) for arm in ("resize", "spacing")}
        dice = {
            arm: {factor: pooled_dice(run, store, cases, factor) for factor in FACTORS} for arm, run in runs.items()
        }
    regions = list(dice["resize"][1.0])
    rows = [
        [factor, *(round(dice[arm][factor][region], 4) for arm in dice for region in regions)] for factor in FACTORS
    ]
    print_table(["field", *(f"{arm}, {region}" for arm in dice for region in regions)], rows)
    of = dice["spacing"]
    differences = {
        f"spacing, infection at {factor:g} - at 1": of[factor]["infection"] - of[1.0]["infection"]
        for factor in FACTORS
        if factor > 1
    }
    print_result("field_of_view", differences, TARGETS)
    return 0


def train(arm: str, store: Store, folder: Path, quick: bool) -> Path:
    """The run of an arm, from the same first weights on the same slices."""
    case = store.cases[0]
    assert case.pixel_size_mm is not None
    spacing_mm = max(case.shape[1:]) * case.pixel_size_mm[0] / IMAGE_SIZE
    run = folder / arm
    words = [f"data.store={store.root}", f"output_dir={run}", "train.batch_size_per_rank=8"]
    words += ["data.fit=crop", f"data.spacing_mm={spacing_mm}"] if arm == "spacing" else []
    words += ["train.max_steps=4"] if quick else []
    if not (run / "best").is_dir():
        subprocess.run([sys.executable, "-m", "distseg.train", "--config", "quickstart", *words], check=True)
    return run


def pooled_dice(run: Path, store: Store, cases: Sequence[Case], factor: float) -> dict[str, float]:
    """Of each region over all voxels of the cases, at a field of view of so many times their own."""
    folder, config = open_run(run)
    _, segmenter = load_best(folder, config)
    counts = dict.fromkeys(config.regions, np.zeros(2))
    for case in cases:
        hu_ZYX, truth_ZYX = (
            at_field(whole, factor, fill) for whole, fill in zip(store.read_case(case), (AIR_HU, 0), strict=True)
        )
        pixel_mm = case.pixel_size_mm if config.data.spacing_mm else None
        mask_ZYX, _ = segment_volume(segmenter, hu_ZYX, CPU, 4, pixel_mm=pixel_mm)
        for region, labels in config.region_labels.items():
            found, truth = np.isin(mask_ZYX, labels), np.isin(truth_ZYX, labels)
            counts[region] = counts[region] + (2 * (found & truth).sum(), found.sum() + truth.sum())
    return {region: float(both / either) for region, (both, either) in counts.items()}


def at_field(whole_ZYX: np.ndarray, factor: float, fill: float) -> np.ndarray:
    """Cropped or padded around the middle, to so many times its rows and columns."""
    _, *sides = whole_ZYX.shape
    more = [round(side * (factor - 1) / 2) for side in sides]
    if factor < 1:
        (y, x), (height, width) = more, sides
        return np.ascontiguousarray(whole_ZYX[:, -y : height + y, -x : width + x])
    return np.pad(whole_ZYX, [(0, 0), *((n, n) for n in more)], constant_values=int(fill))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, metavar="STORE", help="of the quickstart")
    parser.add_argument("--runs", type=Path, metavar="FOLDER", help="that keeps the runs")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
