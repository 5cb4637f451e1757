"""What the training loop costs: ours against a bare one on tensors in memory, `python tests/benchmarks/loop_overhead.py [--quick]`.

Same network, loss, optimizer, precision, threads and batch size. The bare loop has its batches in memory and does nothing but forward,
loss, backward and step. Ours is `distseg.train`, which reads slices with DALI, sets learning rate and seed, logs every step and saves
a checkpoint twice. Turns of a few steps alternate in one process: the bare loop has its turn when ours has noted the last step of one.
The ratio is the median over turns, ours without the seconds for which a checkpoint holds the loop; those, and validation's, are
given apart. DALI reads on during the bare loop's turn, so at most two of our steps find more ready than they would.
"""

import argparse
import contextlib
import functools
import io
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report import print_result, print_table, print_versions

import distseg.train
from distseg.config import Config
from distseg.config_files import load_config
from distseg.data.preparing import FoldRule, prepare_store
from distseg.data.store import open_store, settled
from distseg.errors import positive_int
from distseg.kernels import region_bits
from distseg.losses import build_loss
from distseg.models.network import build_model
from distseg.optim import build_optimizer
from distseg.phantoms.case import write_phantom
from distseg.training.loop import Trainer
from distseg.training.step_log import StepLog

STEP_END = (StepLog, "add")  # the method that notes a step
WATCHED: tuple[tuple[type, str], ...] = (
    STEP_END, (StepLog, "flush"), (StepLog, "timed_next"), (Trainer, "_save"), (Trainer, "_validate"),
)  # fmt: skip
N_BATCHES = 4  # that the bare loop has in memory
TARGETS = {"slices_per_s_ours_over_bare": ">= 0.97"}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    image_size: int
    batch: int
    steps: int  # of a turn
    turns: int  # and one to warm up

    @property
    def all_steps(self) -> int:
        return self.steps * (self.turns + 1)


FULL = Size(image_size=128, batch=2, steps=6, turns=40)
QUICK = Size(image_size=64, batch=2, steps=2, turns=4)


@dataclass
class Seen:
    """Start and end of calls and of turns, on one clock, in seconds."""

    calls: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    ours: list[tuple[float, float]] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)

    def within(self, name: str, turn: tuple[float, float]) -> float:
        """Seconds of calls of that name in a turn."""
        return sum(end - start for start, end in self.calls[name] if turn[0] <= start and end <= turn[1])

    def ours_s(self) -> list[float]:
        """Seconds of our turns without those of saving."""
        return [turn[1] - turn[0] - self.within("_save", turn) for turn in self.ours]

    def bare_s(self) -> list[float]:
        return [end - start for start, end in self.bare]

    def share(self, *names: str) -> float:
        """Of our turns' seconds."""
        return sum(self.within(name, turn) for name in names for turn in self.ours) / sum(self.ours_s())

    def seconds(self, name: str, without: str = "") -> float:
        """Median of a call, without the calls of another name in it; 0 if there was none."""
        found = [call[1] - call[0] - (self.within(without, call) if without else 0) for call in self.calls[name]]
        return statistics.median(found) if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size: whether it works, not how fast it is")
    parser.add_argument("--threads", type=positive_int, default=1, help="torch's; DALI has one of its own")
    args = parser.parse_args()
    size = QUICK if args.quick else FULL
    torch.set_num_threads(args.threads)
    print_versions(["torch", "accelerate", "nvidia-dali-cuda130"])
    print(
        f"{size.batch} slices of {size.image_size} x {size.image_size}, {size.turns} turns of {size.steps} steps, "
        f"{args.threads} thread(s)"
    )
    seen = measure(size)
    ours, bare = seen.ours_s(), seen.bare_s()
    ratios = {
        "slices_per_s_ours_over_bare": statistics.median(b / o for o, b in zip(ours, bare, strict=True)),
        "logging_share": seen.share("add", "flush"),
        "data_wait_share": seen.share("timed_next"),
        "save_holds_s": seen.seconds("_save"),
        "validation_s": seen.seconds("_validate", without="_save"),
    }
    medians = {"distseg": statistics.median(ours) / size.steps, "bare": statistics.median(bare) / size.steps}
    print_table(["loop", "ms a step", "slices/s"], [[name, 1e3 * s, size.batch / s] for name, s in medians.items()])
    print_table(["part of distseg's", "per cent"], [[n, 100 * ratios[f"{n}_share"]] for n in ("logging", "data_wait")])
    print_table(["once in a while", "seconds"], [[name, ratios[f"{name}_s"]] for name in ("save_holds", "validation")])
    print_result("loop_overhead", ratios, TARGETS)


def measure(size: Size) -> Seen:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        # More training slices than are used, so that no epoch ends before the last step.
        write_phantom(
            work / "phantom", cases=6, seed=0, size=size.image_size, n_slices=size.batch * size.all_steps // 2
        )
        prepare_store(work / "phantom", work / "store", FoldRule(n_folds=3, n_test=1), workers=2)
        config = load_config(
            None,
            [
                "model.encoder=gernet_s", "model.decoder_widths=[16, 16, 32, 32, 32]", f"data.store={work / 'store'}",
                f"data.image_size={size.image_size}", "data.num_threads=1", f"train.batch_size_per_rank={size.batch}",
                f"train.max_steps={size.all_steps}", f"checkpoint.every_steps={size.all_steps // 3}",
                f"output_dir={work / 'run'}",
            ],
        )  # fmt: skip
        config = settled(config, open_store(work / "store"))
        with watched(bare_loop(config, size), size) as seen, contextlib.redirect_stdout(io.StringIO()):
            distseg.train.train(config)
    return seen


def bare_loop(config: Config, size: Size) -> Callable[[], None]:
    """One step of it; the network, its optimizer and a few batches live on."""
    torch.manual_seed(config.seed)
    network = build_model(config.model, config.data.channels, len(config.regions))
    network.to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(config.optim, network)
    criterion = build_loss(config.loss, list(config.regions), region_bits(config.region_labels))
    images = torch.rand(N_BATCHES, size.batch, config.data.channels, size.image_size, size.image_size)
    labels = torch.randint(0, 3, (N_BATCHES, size.batch, size.image_size, size.image_size), dtype=torch.uint8)
    batches = itertools.cycle(zip([i.to(memory_format=torch.channels_last) for i in images], labels, strict=True))

    def step() -> None:
        image_BCHW, label_BHW = next(batches)
        criterion(network(image_BCHW), label_BHW).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@contextlib.contextmanager
def watched(bare_step: Callable[[], None], size: Size) -> Iterator[Seen]:
    """Notes the calls of WATCHED, those that there are, and gives the bare loop its turns; the first turns do not count."""
    seen = Seen()
    turn_start = 0.0

    def after_step() -> None:
        nonlocal turn_start
        n_steps = len(seen.calls["add"])
        if n_steps % size.steps:
            return
        start = time.perf_counter()
        for _ in range(size.steps):
            bare_step()
        end = time.perf_counter()
        if n_steps > size.steps:
            seen.ours.append((turn_start, start))
            seen.bare.append((start, end))
        turn_start = end

    originals = [(owner, name, vars(owner)[name]) for owner, name in WATCHED if name in vars(owner)]
    for owner, name, method in originals:
        setattr(owner, name, _noted(method, seen.calls[name], after_step if (owner, name) == STEP_END else None))
    try:
        yield seen
    finally:
        for owner, name, method in originals:
            setattr(owner, name, method)


def _noted(method: Any, calls: list[tuple[float, float]], after: Callable[[], None] | None) -> Any:
    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = method(*args, **kwargs)
        calls.append((start, time.perf_counter()))
        if after:
            after()
        return result

    return noted


if __name__ == "__main__":
    main()
