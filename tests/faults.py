"""Kills training at random moments until it has survived: `python tests/faults.py STORE --kills 50`.

Each time one rank of two (or the launcher with all of them) is killed with SIGKILL after a random while, and the job is
started again with --resume. The end must be the bits of a run that nobody disturbed: weights, moving average, every line
of the log, every sample with its digest.
"""

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from distseg.tables import read_rows

ROOT = Path(__file__).parent.parent
SETTINGS = [
    "data.image_size=64", "data.num_threads=1", "data.log_samples=true", "model.encoder=gernet_s", "model.dropout=0.1",
    "model.decoder_widths=[8, 8, 8, 8, 8]", "train.batch_size_per_rank=2", "train.gradient_accumulation_steps=2",
    "train.log_every_steps=1", "optim.lr=1e-3", "optim.schedule=cosine", "optim.warmup_steps=5", "optim.ema_decay=0.95",
    "checkpoint.every_steps=3", "checkpoint.keep_best=1",
]  # fmt: skip
FIGURES = ("step", "epoch", "split", "lr", "loss", "bce", "dice", "mean_dice")


@dataclass
class Kills:
    """What the kills cost."""

    lost_steps: list[int] = field(default_factory=list)
    """logged steps that had to be done again"""
    recovery_s: list[float] = field(default_factory=list)
    """from the start after a kill to its first logged step"""


def command(store: Path, out: Path, steps: int, ranks: int) -> list[str]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--monitor-interval",
        "0.2",
    ]
    words = [f"data.store={store}", f"output_dir={out}", f"train.max_steps={steps}", "train.epochs=99"]
    return [*torchrun, "distseg/train.py", *SETTINGS, *words, "--resume"]


def start(words: Sequence[str]) -> subprocess.Popen[bytes]:
    nothing: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(
        words, cwd=ROOT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **nothing
    )


def steps_logged(out: Path) -> int:
    return sum(row["split"] == "train" for row in read_rows(out / "metrics.jsonl"))


def kill(job: subprocess.Popen[bytes], chance: random.Random) -> None:
    """SIGKILL to one rank, after which its launcher ends the others; or to all at once, as when a machine goes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(job.pid)
        everyone = launcher.children(recursive=True)
        ranks = [process for process in everyone if "distseg/train.py" in process.cmdline()]
        if ranks and chance.random() < 0.5:
            chance.choice(ranks).kill()
            # A launcher may hang after a kill (torch 2.14, one in some tens); a scheduler would end it too.
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(timeout=10)
        for process in [launcher, *everyone]:  # ranks are in process groups of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone)
    job.wait()


def disturbed(words: Sequence[str], out: Path, steps: int, kills: int, chance: random.Random) -> Kills:
    """Runs to the end in spite of so many kills."""
    suffered = Kills()
    while True:
        begun, before = time.monotonic(), steps_logged(out)
        job = start(words)
        # Some kills fall into the start, most into the steps, validations and checkpoints after it.
        patience_s, going_s = chance.uniform(0, 12) if chance.random() < 0.2 else None, chance.uniform(0, 4)
        resumed = None
        while job.poll() is None:
            now, step = time.monotonic() - begun, steps_logged(out)
            if resumed is None and (out / "lock").exists() and step < before:
                suffered.lost_steps.append(before - step)
                before = step
            if resumed is None and step > before:
                resumed = now
                suffered.recovery_s.append(now)
            due = now > patience_s if patience_s is not None else resumed is not None and now > resumed + going_s
            if due and kills:
                kill(job, chance)
                kills -= 1
                print(f"killed at step {steps_logged(out)}, {kills} to go", flush=True)
            time.sleep(0.02)
        if not kills and steps_logged(out) >= steps and job.returncode == 0:
            return suffered


def differences(one: Path, other: Path, steps: int) -> list[str]:
    """What is not the same in two finished runs."""
    found = []
    for name in ("weights", "ema"):
        tensors = [load_file(run / "checkpoints" / f"step_{steps}" / f"{name}.safetensors") for run in (one, other)]
        if any(not torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]):
            found.append(name)
    states = [torch.load(run / "checkpoints" / f"step_{steps}" / "optimizer.pt") for run in (one, other)]
    for name, values in states[0]["optimizer"].items():
        if any(not torch.equal(value, states[1]["optimizer"][name][key]) for key, value in values.items()):
            found.append(f"optimizer state of {name}")
    best = [load_file(run / "best/weights.safetensors") for run in (one, other)]
    found += ["best weights"] if any(not torch.equal(best[0][key], best[1][key]) for key in best[0]) else []
    logs = [[{k: row.get(k) for k in FIGURES} for row in read_rows(run / "metrics.jsonl")] for run in (one, other)]
    found += ["metrics.jsonl"] if logs[0] != logs[1] else []
    samples = [[read_rows(run / f"samples/rank{rank}.jsonl") for rank in range(2)] for run in (one, other)]
    return found + (["samples"] if samples[0] != samples[1] else [])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        start(command(args.store, whole, args.steps, 2)).wait()
        words = command(args.store, cut, args.steps, 2)
        suffered = disturbed(words, cut, args.steps, args.kills, random.Random(args.seed))
        differ = differences(whole, cut, args.steps)
    recovery = sorted(suffered.recovery_s)
    print(
        f"{args.kills} kills, {sum(suffered.lost_steps)} steps done again (at most {max(suffered.lost_steps, default=0)} at a "
        f"time), {recovery[len(recovery) // 2]:.1f} s from a start to its first step (median), "
        + (f"DIFFERENT: {', '.join(differ)}" if differ else "bit-equal to the undisturbed run")
    )
    return bool(differ)


if __name__ == "__main__":
    raise SystemExit(main())
