"""Checkpoints: found by content, torn ones passed over, read without pickle."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distseg.data.plan import Position
from distseg.errors import DistsegError
from distseg.runs.checkpoint import (
    WEIGHTS,
    Checkpoint,
    CheckpointWriter,
    Progress,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def save(folder: Path, step: int, score: float | None = None, run_id: str = "") -> Path:
    weights = {"w": torch.full((4,), float(step))}
    progress = Progress(step, Position(1, 3 * step), score=score)
    checkpoint = Checkpoint(progress, weights, {"optimizer": {"lr": 0.1, "m": weights["w"]}}, {"w": weights["w"] / 2})
    return save_checkpoint(folder, checkpoint, run_id)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1] == Progress(10, Position(1, 30))
    loaded = load_checkpoint(found[0])
    assert loaded.progress == found[1] and loaded.weights["w"].tolist() == [10.0] * 4
    assert loaded.ema is not None and loaded.ema["w"].tolist() == [5.0] * 4
    assert loaded.state["optimizer"]["m"].tolist() == [10.0] * 4


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.8), (4, None), (5, 0.1)):
        save(tmp_path, step, score)
    prune_checkpoints(tmp_path, 5, keep_last=2, keep_best=2)
    assert names(tmp_path) == ["step_1", "step_3", "step_4", "step_5"]
    prune_checkpoints(tmp_path, 5, keep_last=1)
    assert names(tmp_path) == ["step_5"]


def test_what_a_resume_passed_over_pushes_out_nothing(tmp_path: Path) -> None:
    for step in (100, 110, 120):
        save(tmp_path, step)
    for step in (110, 120):
        (tmp_path / f"step_{step}" / WEIGHTS).write_bytes(b"torn")
    save(tmp_path, 105)
    prune_checkpoints(tmp_path, 105, keep_last=2)
    assert names(tmp_path) == ["step_100", "step_105"]


@pytest.mark.parametrize(
    ("network", "run_id", "reason"),
    [
        ({"w": torch.zeros(5)}, "", "of another model (w: [4] there, [5] here)"),
        ({"v": torch.zeros(4), "w": torch.zeros(4)}, "", "of another model (v: None there, [4] here)"),
        ({"w": torch.zeros(4)}, "ours", "of another run"),
    ],
)
def test_a_foreign_checkpoint_is_told_apart(
    network: dict[str, torch.Tensor], run_id: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, run_id="theirs")
    assert newest_checkpoint(tmp_path, {"w": torch.zeros(4)}, "theirs") is not None
    assert newest_checkpoint(tmp_path, network, run_id) is None and reason in caplog.text


def test_a_failed_write_costs_a_warning_and_only_the_last_one_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    writer = CheckpointWriter()
    writer.submit(full)
    writer.submit(lambda: save(tmp_path, 1) and None)
    assert "not written ([Errno 28]" in caplog.text
    writer.close()
    assert names(tmp_path) == ["step_1"]
    writer = CheckpointWriter()
    writer.submit(full)
    with pytest.raises(DistsegError, match="the last one got .* make room and start again with --resume"):
        writer.close()


@pytest.mark.parametrize("seed", range(8))
def test_a_checkpoint_cut_at_any_byte_is_passed_over(seed: int, tmp_path: Path) -> None:
    """25 cuts each."""
    random = np.random.default_rng(seed)
    save(tmp_path, 1)
    whole = {path: path.read_bytes() for path in save(tmp_path, 2).iterdir()}
    for _ in range(25):
        path = random.choice(sorted(whole))
        path.write_bytes(whole[path][: random.integers(len(whole[path]))])
        found = newest_checkpoint(tmp_path, {"w": torch.zeros(4)})
        assert found is not None and found[0].name == "step_1"
        path.write_bytes(whole[path])
    assert len(whole) == 5


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "ema.safetensors", "optimizer.pt", "progress.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "missing", "flipped"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(
    file: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    torn = save(tmp_path, 2) / file
    content = torn.read_bytes()
    if damage == "missing":
        torn.unlink()
    elif damage == "cut":
        torn.write_bytes(content[: len(content) // 2])
    else:
        torn.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None and found[0].name == "step_1"
    assert "step_2" in caplog.text and "passed over" in caplog.text


def test_the_newest_is_told_by_content_and_not_by_name(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 9)
    shutil.move(tmp_path / "step_9", tmp_path / "moved")
    (tmp_path / "step_99").mkdir()
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[0].name == "moved"
    assert newest_checkpoint(tmp_path / "none") is None
