"""Weak scaling of the real trainer over cores of this machine, each rank held on one: `distseg.train` by torchrun, over gloo.

Started by scaling.py. One process alone; two that do not know of each other: what they lose, they lose to the memory and the machine
that they share; two ranks with a batch norm each; two with a common one.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

ENCODER, WIDTHS = "gernet_s", (16, 16, 32, 32, 32)
WORDS = [
    f"model.encoder={ENCODER}", f"model.decoder_widths={list(WIDTHS)}", "data.num_threads=1", "data.augment.preset=none",
    "train.log_every_steps=1", "train.epochs=1000",
]  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    image_size: int
    batch: int  # of a rank
    steps: int
    turns: int


FULL = Size(image_size=128, batch=4, steps=24, turns=3)
QUICK = Size(image_size=64, batch=2, steps=4, turns=1)


@dataclass(frozen=True)
class Measured:
    """Of each turn: seconds of a step, by way; latency and bandwidth of gloo's all-reduce between the two cores."""

    seconds: Mapping[str, Sequence[float]]
    gloo: Sequence[tuple[float, float]]  # seconds; bytes/s of the bus

    @property
    def latency(self) -> float:
        return statistics.median(latency for latency, _ in self.gloo)

    @property
    def bandwidth(self) -> float:
        return statistics.median(bandwidth for _, bandwidth in self.gloo)

    def efficiency(self, way: str) -> float:
        """Slices a second of a rank over those of one alone: the median over turns."""
        return statistics.median(a / s for a, s in zip(self.seconds["alone"], self.seconds[way], strict=True))


def measure(size: Size) -> Measured:
    seconds, gloo = defaultdict(list), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_store(work, size)
        sizes = {
            "data.image_size": size.image_size,
            "train.batch_size_per_rank": size.batch,
            "train.max_steps": size.steps,
        }
        words = [*WORDS, f"data.store={work / 'store'}", *(f"{key}={value}" for key, value in sizes.items())]
        for turn in tqdm(range(size.turns), "turns", leave=False, disable=None):
            for name, run in WAYS.items():
                outs = [work / f"{name}{turn}_{core}" for core in range(2)]
                run(outs, words)
                seconds[name].append(max(step_of_run(out, size) for out in outs if out.exists()))
            finish(torchrun("gloo", str(work / "gloo.json")))
            gloo.append(json.loads((work / "gloo.json").read_text()))
    return Measured(seconds, gloo)


def make_store(work: Path, size: Size) -> None:
    """More training slices than a run uses: no epoch ends, nothing is saved between steps that count."""
    from distseg.data.preparing import FoldRule, prepare_store
    from distseg.phantoms.case import write_phantom

    n_slices = size.batch * size.steps  # of a case; at least two of the six train, two ranks share them
    write_phantom(work / "phantom", cases=6, seed=0, size=size.image_size, n_slices=n_slices)
    prepare_store(work / "phantom", work / "store", FoldRule(n_folds=3, n_test=1), workers=2)


def step_of_run(out: Path, size: Size) -> float:
    """Median seconds of a step; the first quarter, in which oneDNN and DDP set themselves up, is left out."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["slices_per_s"] for row in rows if row["split"] == "train"][size.steps // 4 :]
    ranks = json.loads((out / "environment.json").read_text())["world_size"]
    return ranks * size.batch / statistics.median(speeds)


# ---- processes


def alone(outs: list[Path], words: list[str]) -> None:
    finish(start([sys.executable], "0", "train", *words, f"output_dir={outs[0]}"))


def unconnected(outs: list[Path], words: list[str]) -> None:
    finish(*(start([sys.executable], str(i), "train", *words, f"output_dir={out}") for i, out in enumerate(outs)))


def own_norm(outs: list[Path], words: list[str]) -> None:
    finish(torchrun("train", *words, "model.norm=batch", f"output_dir={outs[0]}"))


def common_norm(outs: list[Path], words: list[str]) -> None:
    finish(torchrun("train", *words, f"output_dir={outs[0]}"))


WAYS: dict[str, Callable[[list[Path], list[str]], None]] = {
    "alone": alone, "unconnected": unconnected, "own_norm": own_norm, "common_norm": common_norm,
}  # fmt: skip


def torchrun(*words: str) -> subprocess.Popen[str]:
    return start([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], "0", *words)


def start(launcher: list[str], core: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, __file__, core, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{process.args!r} exited with {process.returncode}:\n{output[-6000:]}")


def work_on_core(core: str, task: str, *words: str) -> int:
    """In a process of its own: the task with one thread, on the core of torchrun's local rank, or of that number without it."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", core)) % len(cores)]})
    torch.set_num_threads(1)
    if task == "gloo":
        return measure_gloo(Path(words[0]))
    from distseg.train import main

    return main(list(words))


def measure_gloo(out: Path) -> int:
    """Latency, from one number, and bus bandwidth, from a bucket of 8 MiB, of an all-reduce."""
    dist.init_process_group("gloo")
    small, large = all_reduce_seconds(1, rounds=200), all_reduce_seconds(2**21, rounds=20)
    n = dist.get_world_size()
    if dist.get_rank() == 0:
        out.write_text(json.dumps([small, 2 * (n - 1) / n * 4 * 2**21 / max(large - small, 1e-6)]))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def all_reduce_seconds(numel: int, rounds: int) -> float:
    """Mean of an all-reduce of that many float32, each after a millisecond's work as in training: ranks wait for each other."""
    tensor, matrix, seconds = torch.zeros(numel), torch.rand(300, 300), 0.0
    for _ in range(rounds):
        matrix @ matrix
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        seconds += time.perf_counter() - begin
    return seconds / rounds


if __name__ == "__main__":
    raise SystemExit(work_on_core(*sys.argv[1:]))
