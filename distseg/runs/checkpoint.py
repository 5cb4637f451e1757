"""Checkpoints: written aside, flushed, renamed; the newest complete one is found by what is in it, not by its name.

    checkpoints/step_<n>/  weights.safetensors  [ema.safetensors]  optimizer.pt  progress.json
                           manifest.json (the run's id, sha256 of the others)

Nothing random is saved: every step seeds itself from (seed, rank, step), see loop.py.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distseg.errors import DistsegError
from distseg.files import folder_written_aside, sha256_of, write_json
from distseg.runs.progress import Progress

logger = logging.getLogger(__name__)

WEIGHTS, EMA, OPTIMIZER, PROGRESS, MANIFEST = (
    "weights.safetensors", "ema.safetensors", "optimizer.pt", "progress.json", "manifest.json",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """All that a run goes on from: whole tensors by the names of the network's, on the CPU."""

    progress: Progress
    weights: dict[str, Tensor]
    """state dict of the network, buffers included, contiguous"""
    state: dict[str, Any]
    """of optimizer and loss scaler: tensors, numbers and containers only, for it is read back with `weights_only`"""
    ema: dict[str, Tensor] | None = None
    """averaged weights, where the run has them"""


def save_checkpoint(checkpoints: Path, checkpoint: Checkpoint, run_id: str = "") -> Path:
    """Writes one complete checkpoint; it has its name only once it is whole and on the disk."""
    final = checkpoints / f"step_{checkpoint.progress.step}"
    with folder_written_aside(final) as aside:
        save_file(checkpoint.weights, aside / WEIGHTS)
        if checkpoint.ema is not None:
            save_file(checkpoint.ema, aside / EMA)
        torch.save(checkpoint.state, aside / OPTIMIZER)
        write_json(aside / PROGRESS, dataclasses.asdict(checkpoint.progress))
        digests = {file.name: sha256_of(file) for file in sorted(aside.iterdir())}
        write_json(aside / MANIFEST, {"run": run_id, "sha256": digests})
    return final


def prune_checkpoints(checkpoints: Path, at_step: int, keep_last: int, keep_best: int = 0) -> None:
    """Removes all but the last ones up to a step and those with the highest validation scores.

    What claims more steps than the run has done was passed over when it was resumed, as torn or foreign, and goes too: it would
    push out those that are good.
    """
    found = _by_step(checkpoints)
    own = [pair for pair in found if pair[0].step <= at_step]
    scored = [pair for pair in own if pair[0].score is not None]
    best = sorted(scored, key=lambda pair: pair[0].score or 0.0, reverse=True)[:keep_best]
    kept = {folder for _, folder in [*own[:keep_last], *best]}
    for _, folder in found:
        if folder not in kept:
            shutil.rmtree(folder)


def newest_checkpoint(
    checkpoints: Path, network: Mapping[str, Tensor] | None = None, run_id: str = ""
) -> tuple[Path, Progress] | None:
    """The complete checkpoint with the most steps; torn or foreign ones are passed over with a warning.

    Args:
        checkpoints: folder of all of them.
        network: state dict whose names and shapes the weights must have; None: any.
        run_id: of the run that wrote it; "": any.
    """
    for progress, folder in _by_step(checkpoints):
        if problem := _problem(folder, network, run_id):
            logger.warning("checkpoint %s: %s; passed over", folder, problem)
        else:
            return folder, progress
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint that `newest_checkpoint` found whole, onto the CPU."""
    progress = pydantic.TypeAdapter(Progress).validate_json((folder / PROGRESS).read_bytes())
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    ema = load_file(folder / EMA) if (folder / EMA).exists() else None
    return Checkpoint(progress, load_file(folder / WEIGHTS), state, ema)


class CheckpointWriter:
    """Writes on a thread of its own, one checkpoint at a time, so that training does not wait for the disk.

    A disk that is full or gone costs that checkpoint and a warning: the earlier ones stay, training goes on.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._failure: Exception | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Starts to write what is in memory by now, once the one before is done."""
        self.wait()
        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Until nothing is being written."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
            self._failure = None
        except (OSError, SafetensorError, RuntimeError) as error:  # safetensors and torch.save wrap the system's errors
            self._failure = error
            logger.warning("checkpoint: not written (%s); the earlier ones are kept and training goes on", error)

    def close(self) -> None:
        """Waits for the last one.

        Raises:
            DistsegError: it could not be written, so that the end of the run is lost.
        """
        self.wait()
        self._thread.shutdown()
        if self._failure is not None:
            raise DistsegError(
                f"checkpoint: the last one got {self._failure}; it must be written for the run to be complete; "
                "make room and start again with --resume"
            )


def _by_step(checkpoints: Path) -> list[tuple[Progress, Path]]:
    """Folders that say how far they are, newest first."""
    found = []
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        try:
            progress = pydantic.TypeAdapter(Progress).validate_json((folder / PROGRESS).read_bytes())
            found.append((progress, folder))
        except (OSError, pydantic.ValidationError) as error:
            logger.warning("checkpoint %s: no readable progress.json (%s); passed over", folder, type(error).__name__)
    return sorted(found, key=lambda pair: -pair[0].step)


def _problem(folder: Path, network: Mapping[str, Tensor] | None, run_id: str) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        digests = dict(manifest["sha256"])
        wrong = [name for name in {WEIGHTS, OPTIMIZER, PROGRESS, *digests} if sha256_of(folder / name) != digests[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    if wrong:
        return f"{wrong[0]} is not what was written"
    if run_id and manifest["run"] != run_id:
        return "of another run"
    return None if network is None else _misfit(folder / WEIGHTS, network)


def _misfit(weights: Path, network: Mapping[str, Tensor]) -> str | None:
    """What keeps the weights of a file from being those of a network."""
    with safe_open(weights, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    for name in sorted(shapes.keys() | network.keys()):
        own = list(network[name].shape) if name in network else None
        if shapes.get(name) != own:
            return f"of another model ({name}: {shapes.get(name)} there, {own} here)"
    return None
