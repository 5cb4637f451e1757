"""Regions that exclude each other: a sigmoid each, of which the most probable wins, beside one softmax over all of them.

    python tests/benchmarks/exclusive.py [--steps 400] [--seeds 0 1 2] [--kinds lobes classes] [--quick]

Both arms train the same network from the same first weights on the same batches of a phantom: Unet++ on gernet_s, 96 x 96, no
flips. The sigmoids have distseg's BCE + Dice; the softmax has cross-entropy + Dice of the classes but the background, as nnU-Net
and MONAI's DiceCELoss have it. Dice is that of the label map over all pixels of the validation patients, its mean over classes.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from labelled import LABELS, write_labelled
from report import print_result, print_table, print_versions
from torch import Tensor

from distseg.config import Config
from distseg.config_files import load_config
from distseg.data.layouts.finding import Asked
from distseg.data.pipeline import build_train_loader, build_val_loader
from distseg.data.plan import Plan
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.store import Store, open_store, settled
from distseg.kernels import region_bits
from distseg.losses import build_loss
from distseg.models.label_map import LabelMap
from distseg.models.network import build_model
from distseg.optim import build_optimizer, learning_rate, set_learning_rate
from distseg.runs.training_slices import training_slices

ARMS = ("sigmoid", "softmax")
TARGETS = {f"{kind}, softmax / sigmoid": "<= 1.01" for kind in ("lobes", "classes")}
CPU = torch.device("cpu")


def main() -> int:
    args = parse_arguments()
    print_versions(["torch", "timm"])
    torch.set_num_threads(1)
    rows, ratios = [], {}
    with tempfile.TemporaryDirectory() as work:
        for kind in args.kinds:
            store = make_store(Path(work) / kind, kind, args.cases)
            dice = {arm: [train_and_score(arm, store, seed, args.steps) for seed in args.seeds] for arm in ARMS}
            means = {arm: sum(map(sum, values)) / len(values) / len(values[0]) for arm, values in dice.items()}
            for arm, values in dice.items():
                of_class = [sum(column) / len(values) for column in zip(*values, strict=True)]
                rows.append([kind, arm, *([round(means[arm], 4)]), " ".join(f"{value:.3f}" for value in of_class)])
            ratios[f"{kind}, softmax / sigmoid"] = means["softmax"] / max(means["sigmoid"], 1e-9)
    print_table(["labels", "arm", "mean Dice", "of each class"], rows)
    print_result("exclusive", ratios, TARGETS)
    return 0


def make_store(folder: Path, kind: str, cases: int) -> Store:
    write_labelled(folder / "volumes", kind, cases, size=96, n_slices=16)
    rule = FoldRule(n_folds=3)
    prepare_store(
        folder / "volumes", folder / "store", rule, asked=Asked(labels={"background": 0} | LABELS[kind]), workers=2
    )
    return open_store(folder / "store")


def train_and_score(arm: str, store: Store, seed: int, steps: int) -> list[float]:
    """Dice of each class of the validation patients, after so many steps."""
    words = ["data.image_size=96", f"seed={seed}", f"train.max_steps={steps}", "data.augment.flip_probability=0"]
    config = settled(load_config(Path("quickstart"), words), store)
    slices = training_slices(config, store)
    torch.manual_seed(seed)
    n = len(config.regions)
    network = build_model(config.model, config.data.channels, n + (arm == "softmax"))
    optimizer = build_optimizer(config.optim, network)
    criterion = build_loss(config.loss, list(config.regions), region_bits(config.region_labels))
    plan = Plan(len(slices.train), config.train.batch_size_per_rank, seed=seed)
    batches = build_train_loader(config.data, slices.train, plan, seed, CPU)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        set_learning_rate(optimizer, config.optim, learning_rate(config.optim, step, steps), 0)
        logits, label_BHW = network(batch.image_BCHW), batch.label_BHW
        loss = (
            criterion(logits, label_BHW).loss if arm == "sigmoid" else cross_entropy_and_dice(logits, label_BHW.long())
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return dice_of_classes(arm, network.eval(), config, store)


def cross_entropy_and_dice(logits: Tensor, label_BHW: Tensor, smooth: float = 1.0) -> Tensor:
    """Of a softmax over background and classes; Dice over all pixels of the batch, of the classes."""
    probability = logits.softmax(dim=1)[:, 1:]
    truth = F.one_hot(label_BHW, logits.shape[1]).movedim(-1, 1)[:, 1:].to(probability)
    dims = (0, 2, 3)
    dice = (2 * (probability * truth).sum(dims) + smooth) / (probability.sum(dims) + truth.sum(dims) + smooth)
    return F.cross_entropy(logits, label_BHW) + (1 - dice).mean()


@torch.inference_mode()
def dice_of_classes(arm: str, network: torch.nn.Module, config: Config, store: Store) -> list[float]:
    slices, label_map = training_slices(config, store).val, LabelMap(config.region_labels, 0.5)
    plan = Plan(len(slices), config.train.batch_size_per_rank)
    counts = torch.zeros(len(config.regions), 3)
    for batch in itertools.islice(build_val_loader(config.data, slices, plan, CPU), -(-len(slices) // 4)):
        logits = network(batch.image_BCHW)
        found = label_map(logits.sigmoid())[:, 0] if arm == "sigmoid" else logits.argmax(dim=1)
        for row, (label,) in zip(counts, config.region_labels.values(), strict=True):
            inside, truth = (found == label) & (batch.label_BHW != 255), batch.label_BHW == label
            row += torch.tensor([(inside & truth).sum(), inside.sum(), truth.sum()])
    return [(2 * both / (one + other)).item() for both, one, other in counts]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=sorted(LABELS), default=["lobes", "classes"])
    parser.add_argument("--cases", type=int, default=12, help="patients")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.kinds, args.cases = 4, [0], ["lobes"], 3
    return args


if __name__ == "__main__":
    raise SystemExit(main())
