"""What `distseg plan` proposes beside the fixed defaults: the same network, the same time, on the phantom.

    python tests/benchmarks/plan.py [--seeds 0 1 2] [--folds 0 1 2] [--seconds 60] [--fields 360 360] [--quick]

Both arms train Unet++ on gernet_s with the quickstart's optimizer. Each does the optimizer steps that fit into the time, at the
speed that one step of it was measured to have. The score is the mean Dice of lung and infection on the validation patients.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from report import print_result, print_table, print_versions

from distseg.config_files import load_config
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.store import Store, open_store
from distseg.phantoms.case import write_phantom
from distseg.planning import Machine, plan

NETWORK = ["model.encoder=gernet_s", "model.decoder_widths=[16, 32, 64, 128, 256]", "data.num_threads=1"]
NETWORK += [
    "optim.lr=0.004",
    "optim.schedule=cosine",
    "optim.warmup_steps=5",
    "optim.max_grad_norm=1.0",
    "train.batch_size_per_rank=4",
]
TARGETS = {"plan - defaults, mean Dice": ">= 0"}
STEPS_TO_MEASURE = 6


def main() -> int:
    args = parse_arguments()
    print_versions(["torch", "timm"])
    rows, differences = [], []
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_phantom(folder / "volumes", cases=9, seed=0, size=96, n_slices=16, fields_mm=tuple(args.fields))
        prepare_store(folder / "volumes", folder / "store", FoldRule(3), workers=1)
        store = open_store(folder / "store")
        arms = {"defaults": [], "plan": planned(store)}
        steps = {
            arm: 3 if args.quick else int(args.seconds / step_s(words, store, folder / arm))
            for arm, words in arms.items()
        }
        for seed, fold in itertools.product(args.seeds, args.folds):
            dice = {
                arm: train(words, store, folder / f"{arm}_{seed}_{fold}", steps[arm], seed, fold)
                for arm, words in arms.items()
            }
            rows.append([seed, fold, *(round(value, 4) for value in dice.values())])
            differences.append(dice["plan"] - dice["defaults"])
    print(f"steps: {steps}; plan: {' '.join(arms['plan'])}")
    print_table(["seed", "fold", *arms], rows)
    print(f"plan - defaults: {min(differences):+.4f} to {max(differences):+.4f}")
    print_result("plan", {"plan - defaults, mean Dice": sum(differences) / len(differences)}, TARGETS)
    return 0


def planned(store: Store) -> list[str]:
    """The values of a plan that are not the defaults."""
    base = load_config(None, NETWORK)
    given = {word.partition("=")[0]: None for word in NETWORK}
    kept = ("data.image_size", "data.fit", "data.spacing_mm")
    choices = plan(store, base, Machine(None, 1), given=given)
    return [f"{one.key}={one.value}" for one in choices if one.key in kept and one.value is not None]


def step_s(words: Sequence[str], store: Store, folder: Path) -> float:
    """Of a training step, without the start: from two lengths."""
    taken = []
    for steps in (1, 1 + STEPS_TO_MEASURE):
        start = time.perf_counter()
        train(words, store, folder / str(steps), steps, 0, 0)
        taken.append(time.perf_counter() - start)
    return max(1e-3, (taken[1] - taken[0]) / STEPS_TO_MEASURE)


def train(words: Sequence[str], store: Store, run: Path, steps: int, seed: int, fold: int) -> float:
    """Mean Dice on validation after so many steps; 0 where no region has one."""
    command = [
        *NETWORK,
        *words,
        f"data.store={store.root}",
        f"data.fold={fold}",
        f"seed={seed}",
        f"train.max_steps={steps}",
    ]
    subprocess.run(
        [sys.executable, "-m", "distseg.train", *command, f"output_dir={run}"], check=True, capture_output=True
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["split"] == "val"][-1]
    found = [value for value in last["dice"].values() if value is not None]
    return sum(found) / max(1, len(found))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=60, help="of training, each (default 60)")
    parser.add_argument("--fields", type=float, nargs=2, default=[360, 360], help="fields of view of the patients, mm")
    parser.add_argument("--quick", action="store_true", help="three steps, to see that it runs")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
