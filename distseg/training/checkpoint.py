"""Checkpoints: written aside, flushed, renamed; the newest complete one is found by what is in it, not by its name.

    checkpoints/step_<n>/  weights.safetensors  optimizer.pt  progress.json  manifest.json (sha256 of the other three)

Nothing random is saved: every step seeds itself from (seed, rank, step), see loop.py.
"""

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors.torch import load_file, save_file

from distseg.data.plan import Position
from distseg.files import folder_written_aside, sha256_of, write_json

logger = logging.getLogger(__name__)

FILES = ("weights.safetensors", "optimizer.pt", "progress.json")


@dataclass(frozen=True)
class Progress:
    """Where training stands after an optimizer step."""

    step: int = 0
    """optimizer steps done"""
    position: Position = field(default_factory=Position)
    """the next sample of the plan"""
    best_score: float | None = None
    """highest mean validation Dice so far"""
    best_step: int | None = None


def save_checkpoint(
    checkpoints: Path, progress: Progress, weights: dict[str, torch.Tensor], optimizer: dict[str, Any], keep_last: int
) -> Path:
    """Writes one complete checkpoint, then removes the oldest beyond `keep_last`.

    Args:
        checkpoints: folder of all checkpoints of the run.
        progress: stored beside the weights.
        weights: state dict of the network, buffers included, contiguous.
        optimizer: tensors, numbers and containers only: it is read back with `weights_only`.
        keep_last: at least 1.
    """
    final = checkpoints / f"step_{progress.step}"
    with folder_written_aside(final) as aside:
        save_file(weights, aside / "weights.safetensors")
        torch.save(optimizer, aside / "optimizer.pt")
        write_json(aside / "progress.json", dataclasses.asdict(progress))
        write_json(aside / "manifest.json", {name: sha256_of(aside / name) for name in FILES})
    for _, old in _by_step(checkpoints)[keep_last:]:
        shutil.rmtree(old)
    return final


def newest_checkpoint(checkpoints: Path) -> tuple[Path, Progress] | None:
    """The complete checkpoint with the most steps; torn or foreign ones are passed over with a warning."""
    for progress, folder in _by_step(checkpoints):
        if problem := _problem(folder):
            logger.warning("checkpoint %s: %s; passed over", folder, problem)
        else:
            return folder, progress
    return None


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and optimizer state, on the CPU."""
    return load_file(folder / "weights.safetensors"), torch.load(
        folder / "optimizer.pt", map_location="cpu", weights_only=True
    )


def _by_step(checkpoints: Path) -> list[tuple[Progress, Path]]:
    """Folders that say how far they are, newest first."""
    found = []
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        try:
            progress = pydantic.TypeAdapter(Progress).validate_json((folder / "progress.json").read_bytes())
            found.append((progress, folder))
        except (OSError, pydantic.ValidationError) as error:
            logger.warning("checkpoint %s: no readable progress.json (%s); passed over", folder, type(error).__name__)
    return sorted(found, key=lambda pair: -pair[0].step)


def _problem(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        wrong = [name for name in FILES if sha256_of(folder / name) != manifest[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"incomplete ({type(error).__name__}: {error})"
    return f"{wrong[0]} is not what was written" if wrong else None
