"""Checkpoints: found by content, torn ones passed over, read without pickle."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from distseg.data.plan import Position
from distseg.training.checkpoint import Progress, load_checkpoint, newest_checkpoint, save_checkpoint


def save(folder: Path, step: int, keep_last: int = 9) -> Path:
    weights = {"w": torch.full((4,), float(step))}
    progress = Progress(step, Position(1, 3 * step), 0.5, step)
    return save_checkpoint(folder, progress, weights, {"optimizer": {"lr": 0.1, "m": weights["w"]}}, keep_last)


def test_what_was_saved_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_2"]
    found = newest_checkpoint(tmp_path)
    assert found is not None and found[1] == Progress(10, Position(1, 30), 0.5, 10)
    weights, optimizer = load_checkpoint(found[0])
    assert weights["w"].tolist() == [10.0] * 4 and optimizer["optimizer"]["m"].tolist() == [10.0] * 4


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.pt", "progress.json", "manifest.json"])
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
