"""Nodes on one machine: network namespaces with their own addresses, joined by a bridge, each running launch/torchrun.sh.

`python tests/nodes.py STORE` cuts links, kills ranks and nodes, and prints what came of it. Needs root and `ip`.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from distseg.tables import read_rows
from tests.conftest import ROOT, SCRIPTS_FIRST, SMALL, wait_until

STEPS, TIMEOUT_S = 40, 10
SETTINGS = [
    *SMALL, "train.batch_size_per_rank=2", f"train.max_steps={STEPS}", "train.epochs=99", "checkpoint.every_steps=2",
    f"train.timeout_s={TIMEOUT_S}", "data.log_samples=true", "optim.lr=1e-3", "optim.ema_decay=0.9",
]  # fmt: skip


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def namespaces_problem() -> str | None:
    """Why there can be no nodes here; None where there can."""
    name = f"probe{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not allowed here ({error})"
    return None


@dataclass
class Nodes:
    """So many nodes with addresses 10.77.0.1, .2, ...; the first hosts the rendezvous. Within `with`, all is removed after."""

    count: int
    logs: Path
    jobs: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> "Nodes":
        self.hub = f"hub{os.getpid()}"
        ip("netns", "add", self.hub)
        ip("-n", self.hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.hub, "link", "set", "bridge", "up")
        for node in range(self.count):
            name = self.name(node)
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", f"port{node}", "netns", self.hub)
            ip("-n", self.hub, "link", "set", f"port{node}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        return self

    def __exit__(self, *_: Any) -> None:
        for node in range(self.count):
            self.kill(node)
            ip("netns", "del", self.name(node))
        ip("netns", "del", self.hub)

    def name(self, node: int) -> str:
        return f"node{node}-{os.getpid()}"

    def address(self, node: int) -> str:
        return f"10.77.0.{node + 1}"

    def start(self, node: int, nnodes: str, words: Sequence[str]) -> None:
        env = {
            "NNODES": nnodes, "NPROC_PER_NODE": "1", "HEAD": f"{self.address(0)}:29400", "IS_HEAD": str(int(node == 0)),
            "LOCAL_ADDR": self.address(node), "GLOO_SOCKET_IFNAME": "eth0", "MIXED_PRECISION": "no",
            "PATH": SCRIPTS_FIRST,
        }  # fmt: skip
        command = ["ip", "netns", "exec", self.name(node), "bash", "launch/torchrun.sh", *words]
        with (self.logs / f"node{node}.log").open("ab") as log:
            self.jobs[node] = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | env, stdout=log, stderr=log, start_new_session=True
            )

    def link(self, node: int, state: str) -> None:
        """`up` or `down`."""
        ip("-n", self.hub, "link", "set", f"port{node}", state)

    def workers(self, node: int) -> list[int]:
        """Process ids of the ranks."""
        found = []
        for pid in map(int, ip("netns", "pids", self.name(node)).split()):
            with contextlib.suppress(psutil.Error):
                words = psutil.Process(pid).cmdline()
                found += [pid] if len(words) > 2 and words[2:4] == ["-m", "distseg.train"] else []
        return found

    def kill(self, node: int) -> None:
        """All of a node at once, as when its power goes."""
        for pid in map(int, ip("netns", "pids", self.name(node)).split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if node in self.jobs:
            self.jobs.pop(node).wait()

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses of all jobs."""
        end = time.monotonic() + seconds
        return [job.wait(timeout=max(1, end - time.monotonic())) for job in self.jobs.values()]


def train_steps(out: Path) -> list[int]:
    return [row["step"] for row in read_rows(out / "metrics.jsonl") if row["split"] == "train"]


def same_weights(one: Path, other: Path) -> bool:
    found = [load_file(out / f"checkpoints/step_{STEPS}/weights.safetensors") for out in (one, other)]
    return all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def samples_once(out: Path) -> bool:
    """Whether no epoch that is over has a sample twice or lacks one, whatever ranks there were."""
    used = [(row["epoch"], row["sample"]) for path in (out / "samples").glob("*") for row in read_rows(path)]
    epochs = {epoch for epoch, _ in used}
    everything = {sample for _, sample in used}
    whole = {(epoch, sample) for epoch in epochs - {max(epochs)} for sample in everything}
    return len(used) == len(set(used)) and whole <= set(used)


@dataclass
class Scene:
    """Where the scenarios happen."""

    store: Path
    folder: Path

    def words(self, out: Path) -> list[str]:
        return [*SETTINGS, f"data.store={self.store}", f"output_dir={out}"]

    def undisturbed(self, ranks: int) -> Path:
        """So many ranks on one node."""
        out = self.folder / f"one_node_{ranks}"
        if not out.exists():
            env = os.environ | {"NPROC_PER_NODE": str(ranks), "MIXED_PRECISION": "no"}
            env["PATH"] = SCRIPTS_FIRST
            command = ["bash", "launch/torchrun.sh", *self.words(out)]
            subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, timeout=300)
        return out

    def no_fault(self, count: int = 2) -> dict[str, Any]:
        """Several nodes of one rank each against one node."""
        out, whole = self.folder / f"nodes_{count}", self.undisturbed(count)
        with Nodes(count, self.folder) as nodes:
            for node in range(count):
                nodes.start(node, str(count), self.words(out))
            nodes.wait(200)
        return {"fault": f"none, {count} nodes", "bit_equal": same_weights(out, whole)}

    def disturbed(
        self, fault: str, nnodes: str, strike: Callable[[Nodes], None], mend: Callable[[Nodes], None] | None = None
    ) -> dict[str, Any]:
        """Two nodes of which the second is struck in the middle, and mended once training goes on or has failed."""
        out = self.folder / fault.replace(" ", "_")
        with Nodes(2, self.folder) as nodes:
            for node in range(2):
                nodes.start(node, nnodes, self.words(out))
            wait_until(lambda: len(train_steps(out)) >= STEPS // 4, "steps before the fault", 150)
            strike(nodes)
            struck, before = time.monotonic(), train_steps(out)[-1]
            if mend is not None and nnodes == "2":
                time.sleep(TIMEOUT_S)  # long enough to be noticed
                mend(nodes)
            wait_until(
                lambda: (train_steps(out) or [0])[-1] < before or train_steps(out)[-1] > before + 2, "restart", 150
            )
            lost = max(0, before - (train_steps(out) or [0])[-1])
            wait_until(lambda: train_steps(out)[-1] > before - lost, "the first step after it", 150)
            recovered = time.monotonic() - struck
            if mend is not None and nnodes != "2":
                mend(nodes)
            statuses = nodes.wait(240)
        row = {"fault": fault, "lost_steps": lost, "recovered_s": round(recovered, 1), "statuses": statuses}
        return row | {
            "bit_equal": same_weights(out, self.undisturbed(2)),
            "samples_once": samples_once(out),
            "steps": train_steps(out) == list(range(1, STEPS + 1)),
        }

    def worker_killed(self) -> dict[str, Any]:
        return self.disturbed("worker killed", "2", lambda nodes: os.kill(nodes.workers(1)[0], signal.SIGKILL))

    def link_cut(self) -> dict[str, Any]:
        return self.disturbed("link cut", "2", lambda nodes: nodes.link(1, "down"), lambda nodes: nodes.link(1, "up"))

    def node_killed_and_back(self) -> dict[str, Any]:
        """The other goes on alone; the one that comes back is taken in."""
        out = self.folder / "node_killed"
        return self.disturbed(
            "node killed", "1:2", lambda nodes: nodes.kill(1), lambda nodes: nodes.start(1, "1:2", self.words(out))
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--only", choices=("no_fault", "worker_killed", "link_cut", "node_killed_and_back"))
    args = parser.parse_args(argv)
    if problem := namespaces_problem():
        raise SystemExit(problem)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(args.store, Path(folder))
        scenarios = [scene.no_fault, scene.worker_killed, scene.link_cut, scene.node_killed_and_back]
        for scenario in scenarios:
            if args.only in (None, scenario.__name__):
                print(scenario(), flush=True)
                for log in sorted(Path(folder).glob("node*.log")):
                    print(*(line for line in log.read_text().splitlines() if line.startswith("error:")), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
