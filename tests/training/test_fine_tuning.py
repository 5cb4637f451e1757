"""Deep supervision down to a cut export, and starting from another run with the encoder held."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distseg.config import OptimConfig
from distseg.optim import build_optimizer, set_learning_rate
from distseg.runs.folder import RunFolder, best_metadata
from distseg.tables import read_rows
from tests.conftest import SMALL
from tests.training import changes

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def supervised(store: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Run) -> Path:
    out = tmp_path_factory.mktemp("supervised") / "run"
    words = [*SMALL, "model.deep_supervision=true", "model.attention=scse", "model.recompute=decoder"]
    run_command("distseg", "train", *words, f"data.store={store}", "train.max_steps=2", f"output_dir={out}")
    return out


def test_a_deeply_supervised_run_exports_at_each_depth_with_its_cost_and_dice(
    supervised: Path, tmp_path: Path, run_command: Run
) -> None:
    run_command("distseg", "export", supervised, tmp_path / "cut", "--depth", 2)
    described = json.loads((tmp_path / "cut" / "model.json").read_text())
    depths = described["depths"]
    assert [row["depth"] for row in depths] == [1, 2, 3, 4] and described["model"]["depth"] == 2
    for cost in ("parameters", "gmacs"):
        assert all(low[cost] < high[cost] for low, high in zip(depths, depths[1:], strict=False))
    assert all(row["dice"].keys() == {"lung", "infection"} for row in depths)
    assert described["stride"] == 8 and described["verification"]["checks"]
    refused = run_command("distseg", "export", supervised, tmp_path / "five", "--depth", 5, ok=False)
    assert refused.returncode == 1 and "has heads at depths 1 to 3" in refused.stderr


def test_a_run_starts_from_another_with_its_encoder_held_and_its_own_regions(
    supervised: Path, store: Path, tmp_path: Path, run_command: Run
) -> None:
    out = tmp_path / "run"
    words = [*SMALL, "model.attention=scse", f"model.start_from={supervised}", "optim.frozen_encoder_epochs=1"]
    words += ["regions={lung: [1, 2]}", "train.max_steps=2", "model.channels_last=false"]
    run_command("distseg", "train", *words, f"data.store={store}", f"output_dir={out}")
    before, after = (load_file(run / "best/weights.safetensors") for run in (supervised, out))
    encoder = [key for key in after if key.startswith("encoder.") and "running" not in key and "num_batches" not in key]
    assert len(encoder) > 10 and all(torch.equal(before[key], after[key]) for key in encoder)
    assert any(not torch.equal(before[key], after[key]) for key in after if key.startswith("decoder."))
    assert after["heads.4.weight"].shape[0] == 1 and len(read_rows(out / "metrics.jsonl")) >= 2
    other = run_command(
        "distseg", "train", *SMALL, f"model.start_from={supervised}", "model.encoder=resnet18", f"data.store={store}",
        f"output_dir={tmp_path / 'other'}", ok=False,
    )  # fmt: skip
    assert other.returncode == 1 and "model.start_from: got" in other.stderr and "same encoder" in other.stderr


def test_learning_rates_of_encoder_and_rest() -> None:
    network = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optim = OptimConfig(encoder_lr_factor=0.1, frozen_encoder_epochs=2, weight_decay=0.5, name="adamw")
    optimizer = build_optimizer(optim, network)
    for epoch, expected in ((1, 0.0), (2, 0.1)):
        set_learning_rate(optimizer, optim, 1.0, epoch)
        rates = {group["is_encoder"]: group["lr"] for group in optimizer.param_groups}
        assert rates == {True: expected, False: 1.0}
    assert sorted((g["weight_decay"], g["params"][0].ndim) for g in optimizer.param_groups) == [
        (0.0, 1), (0.0, 1), (0.5, 2), (0.5, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("select", "place"), [("best", 0), ("last", -1)])
def test_the_best_or_the_last_weights_become_the_model(
    select: str, place: int, store: Path, tmp_path: Path, run_ranks: Run
) -> None:
    run = tmp_path / "run"
    words = [*SMALL, f"data.store={store}", "train.epochs=2", f"train.select={select}", f"output_dir={run}"]
    run_ranks(1, "train", *words, change=changes.falling_scores)
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "val"]
    assert len(steps) == 2 and best_metadata(RunFolder(run))["step"] == str(steps[place])
