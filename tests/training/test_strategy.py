"""DDP, DeepSpeed ZeRO-0 to 3 and FSDP2 take the same steps, and go on from each other's checkpoints."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg.config import Config
from distseg.errors import DistsegError
from distseg.ranks import connect_ranks, strategy_of_launch
from distseg.tables import read_rows
from distseg.training.zero import zero_settings
from tests.conftest import LAUNCHES, SMALL
from tests.warm import run_function

Run = Callable[..., Any]
# Float32 rounding, amplified by a fresh network and Adam: 3e-6 was seen after four steps.
TOLERANCE = 1e-4
SETTINGS = ["optim.lr=1e-4", "optim.encoder_lr_factor=0.5", "optim.max_grad_norm=0.5",
            "train.batch_size_per_rank=2", "train.gradient_accumulation_steps=2"]  # fmt: skip


def settings(store: Path, out: Path, steps: int) -> list[str]:
    return [*SMALL, *SETTINGS, f"data.store={store}", f"output_dir={out}", f"train.max_steps={steps}", "--resume"]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in read_rows(out / "metrics.jsonl") if row["split"] == "train"]


@pytest.mark.dist
@pytest.mark.slow(120)
@pytest.mark.timeout(900)
def test_strategies_go_on_from_each_other_and_take_the_steps_of_ddp(
    store: Path, tmp_path: Path, run_command: Run, run_ranks: Run
) -> None:
    order = ["zero3", "fsdp2", "zero1", "zero2_offload", "zero3"]
    run_ranks(2, "train", *settings(store, tmp_path / "ddp", len(order)), launch=LAUNCHES["ddp"])
    for step, launch in enumerate(order, start=1):
        words = settings(store, tmp_path / "mixed", step)
        if step <= 2:  # each launch file once as users start it
            launcher = ["accelerate", "launch", "--config_file", *LAUNCHES[launch], "--num_processes", "2"]
            done = run_command(*launcher, "distseg/train.py", *words)
        else:
            done = run_ranks(2, "train", *words, launch=LAUNCHES[launch])
        assert f", {launch.removesuffix('_offload')}, " in done.stdout
    assert losses(tmp_path / "mixed") == pytest.approx(losses(tmp_path / "ddp"), abs=TOLERANCE)


@pytest.mark.dist
@pytest.mark.slow(40)
@pytest.mark.timeout(900)
def test_bfloat16_trains_under_every_strategy(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    found = {}
    for launch in ("ddp", "zero2", "zero3", "fsdp2"):
        bf16 = [*LAUNCHES[launch], "--mixed_precision", "bf16"]
        done = run_ranks(2, "train", *settings(store, tmp_path / launch, 2), launch=bf16)
        assert "precision bf16" in done.stdout
        found[launch] = losses(tmp_path / launch)
    for values in found.values():
        assert values == pytest.approx(found["ddp"], abs=0.02)


def connected_under(_rank: int, strategy: str, out: Path) -> None:
    os.environ[f"ACCELERATE_USE_{strategy.upper()}"] = "true"
    assert strategy_of_launch() == strategy_of_launch() == strategy
    connect_ranks(Config(output_dir=str(out)))
    assert strategy_of_launch() == "ddp"


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
def test_the_launch_says_which_strategy_until_ranks_are_connected(strategy: str, tmp_path: Path) -> None:
    assert strategy_of_launch() == "ddp"
    run_function(1, connected_under, strategy, tmp_path)


def test_deepspeed_is_told_what_launch_and_config_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    settings = zero_settings(Config(), "bf16")
    assert settings["zero_optimization"] == {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert settings["train_micro_batch_size_per_gpu"] == Config().train.batch_size_per_rank
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "gradient_clipping": "auto"}')
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    settings = zero_settings(Config(), "no")
    assert settings["zero_optimization"]["stage"] == 3 and settings["gradient_clipping"] == 0.0
    with pytest.raises(DistsegError, match="got mixed_precision fp16 with DeepSpeed"):
        zero_settings(Config(), "fp16")


def test_a_deepspeed_file_that_is_not_json_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{broken")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    with pytest.raises(DistsegError, match=r"launch: got .*ds.json for DeepSpeed; it must be JSON"):
        zero_settings(Config(), "no")


@pytest.mark.slow(15)
def test_one_process_trains_under_fsdp2_and_is_told_of_a_stage_that_there_is_not(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    words = ["distseg", "train", *SMALL, f"data.store={store}", "train.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    stage = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "7"}
    refused = run_command(*words, ok=False, env=stage)
    assert refused.returncode == 1 and "error: launch: got stage 7 for DeepSpeed" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "run" / "config.yaml").exists()
    assert "1 rank(s) on cpu, fsdp2, " in run_command(*words, env={"ACCELERATE_USE_FSDP": "true"}).stdout


def test_optimizer_numbers_are_not_shared_by_parameters() -> None:
    from distseg.training.tensors import like

    step = torch.tensor(3.0)
    assert like(torch.zeros(2), step) is not step
