"""What a run survives: bad steps, signals, a full disk, another job, a rank that hangs."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distseg.tables import read_rows
from tests import warm
from tests.conftest import LAUNCHES, ROOT, SCRIPTS_FIRST, SMALL, wait_until
from tests.training import changes

Run = Callable[..., Any]
TWO_RANKS = ["accelerate", "launch", "--config_file", "launch/cpu.yaml", "--num_processes", "2"]


def settings(store: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.store={store}", f"output_dir={out}", "optim.lr=1e-3", *more]


def weights(out: Path, step: int, name: str = "weights") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step_{step}" / f"{name}.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train_rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(out / "metrics.jsonl") if row["split"] == "train"]


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str] | warm.Started]:
    """A command under way in a process group of its own, killed if the test leaves it running; `distseg` is forked."""
    with tempfile.TemporaryDirectory() as folder:
        process: subprocess.Popen[str] | warm.Started
        if words[0] == "distseg":
            process = warm.Started(words[1:], Path(folder), ROOT)
        else:
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            env = os.environ | {"PATH": SCRIPTS_FIRST}
            process = subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, **pipes)
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.dist
@pytest.mark.slow(15)
@pytest.mark.parametrize("launch", ["ddp", "zero0", "zero3", "fsdp2"])
def test_a_step_whose_loss_is_not_finite_on_one_rank_is_skipped_by_all_under_every_strategy(
    launch: str, store: Path, tmp_path: Path, run_ranks: Run
) -> None:
    out = tmp_path / "run"
    words = settings(store, out, "train.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    bad = partial(changes.nan_logits, {2, 3}, "1")
    run_ranks(2, "train", *words, "optim.ema_decay=0.9", launch=LAUNCHES[launch], change=bad)
    assert [row.get("skipped", False) for row in train_rows(out)] == [False, True, True, False]
    assert [row["loss"] is None for row in train_rows(out)] == [False, True, True, False]
    progress = [json.loads((out / "checkpoints" / f"step_{n}" / "progress.json").read_text()) for n in (1, 2, 3, 4)]
    assert [p["skipped_steps"] for p in progress] == [0, 1, 2, 2] and progress[3]["skipped_in_a_row"] == 0
    for name in ("weights", "ema"):
        first = weights(out, 1, name)
        floats = {key: value for key, value in first.items() if value.is_floating_point()}
        for step in (2, 3):
            assert same(floats, {key: weights(out, step, name)[key] for key in floats})
        assert not same(first, weights(out, 4, name))


@pytest.mark.slow(10)
def test_too_many_bad_steps_in_a_row_end_the_run_with_what_to_try(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    out = tmp_path / "run"
    words = settings(store, out, "optim.lr=1e30", "train.max_skipped_steps=3", "train.max_steps=20")
    done = run_command("distseg", "train", *words, ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: loss: got 3 steps in a row, to step \d+, whose loss or gradient", done.stderr)
    assert "lower optim.lr" in done.stderr


@pytest.mark.dist
@pytest.mark.slow(60)
def test_a_preempted_run_saves_leaves_its_marker_and_goes_on_bit_for_bit(
    store: Path, tmp_path: Path, run_ranks: Run
) -> None:
    whole, cut = (
        settings(store, tmp_path / part, "train.max_steps=14", "optim.ema_decay=0.9", "optim.schedule=poly")
        for part in ("whole", "cut")
    )
    out = tmp_path / "cut"
    run_ranks(2, "train", *whole)
    with started(*TWO_RANKS, "distseg/train.py", *cut) as job:
        wait_until(lambda: len(train_rows(out)) >= 2, "two steps", 120, job)
        job.send_signal(signal.SIGTERM)  # the launcher hands it on
        text = job.communicate(timeout=60)[0]
    marker = json.loads((out / "preempted.json").read_text())
    assert marker["signal"] == "SIGTERM" and 2 <= marker["step"] < 14
    assert f"stopped by SIGTERM after step {marker['step']}" in text and job.returncode != 0
    assert (out / "checkpoints" / f"step_{marker['step']}").is_dir() and not (out / "lock").exists()
    run_ranks(2, "train", *cut, "--resume")
    assert not (out / "preempted.json").exists()
    for kind in ("weights", "ema"):
        assert same(weights(out, 14, kind), weights(tmp_path / "whole", 14, kind))
    kept = ("step", "split", "loss", "dice")
    logs = [[{k: row[k] for k in kept} for row in read_rows(p / "metrics.jsonl")] for p in (out, tmp_path / "whole")]
    assert logs[0] == logs[1]


def test_a_kill_right_after_a_checkpoint_loses_no_line_of_the_log(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    words = [
        "train",
        *settings(store, tmp_path, "train.max_steps=6", "checkpoint.every_steps=4", "train.log_every_steps=100"),
    ]
    killed = run_ranks(1, *words, ok=False, change=changes.kill_after_checkpoint)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4]
    run_ranks(1, *words, "--resume")
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_ctrl_c_once_finishes_the_step_and_saves(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with started("distseg", "train", *settings(store, out)) as job:
        wait_until(lambda: len(train_rows(out)) >= 2, "two steps", 120, job)
        os.killpg(job.pid, signal.SIGINT)
        text = job.communicate(timeout=60)[0]
    assert job.returncode == 130 and "stopped by SIGINT after step" in text and "Traceback" not in text
    assert list((out / "checkpoints").glob("step_*"))


@pytest.mark.slow(15)
def test_ctrl_c_twice_stops_at_once(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # So many slices at once that a step lasts longer than the wait between the two.
    words = settings(store, out, "data.image_size=512", "train.batch_size_per_rank=48")
    with started("distseg", "train", *words) as job:
        wait_until(lambda: (out / "config.yaml").exists(), "its file", 120, job)
        time.sleep(4)
        os.killpg(job.pid, signal.SIGINT)
        time.sleep(1.2)
        os.killpg(job.pid, signal.SIGINT)
        text = job.communicate(timeout=60)[0]
    assert job.returncode == 130 and "interrupted" in text, text
    assert not list((out / "checkpoints").glob("step_*"))


@pytest.mark.slow(15)
def test_a_signal_during_validation_is_not_kept_waiting(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    whole, cut = (settings(store, tmp_path / part, "train.max_steps=2") for part in ("whole", "cut"))
    out = tmp_path / "cut"
    run_ranks(1, "train", *whole)
    stopped = run_ranks(1, "train", *cut, ok=False, change=changes.signal_in_validation)
    assert stopped.returncode == 143 and "stopped by SIGTERM after step 2" in stopped.stderr
    assert json.loads((out / "checkpoints/step_2/progress.json").read_text())["to_validate"]
    assert not [row for row in read_rows(out / "metrics.jsonl") if row["split"] == "val"]
    run_ranks(1, "train", *cut, "--resume")
    assert same(load_file(out / "best/weights.safetensors"), load_file(tmp_path / "whole/best/weights.safetensors"))
    assert [row["split"] for row in read_rows(out / "metrics.jsonl")] == ["train", "train", "val"]


@pytest.mark.dist
def test_a_run_folder_belongs_to_one_job(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    out = tmp_path / "run"
    with started("distseg", "train", *settings(store, out)) as job:
        wait_until(lambda: train_rows(out), "a step", 120, job)
        again = run_ranks(2, "train", *settings(store, out), "--resume", ok=False)
    assert again.returncode == 1 and "Traceback (most" not in again.stderr.split("error: ")[1].split("\n")[0]
    assert f"which process {job.pid} on" in again.stderr and again.stderr.count("error: output_dir") == 1
    run_ranks(1, "train", *settings(store, out, "train.max_steps=1"), "--resume")  # a killed job's lock is gone


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow(20)
def test_a_full_disk_keeps_what_there_is_and_the_run_goes_on_when_there_is_room(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    words = ["train.max_steps=12", "checkpoint.every_steps=2"]
    run_command("distseg", "train", *settings(store, tmp_path / "whole", *words))
    with mounted(tmp_path / "disk", "size=400m") as disk:
        out, filler = disk / "run", disk / "filler"
        with started("distseg", "train", *settings(store, out, *words)) as job:
            wait_until(lambda: (out / "checkpoints/step_2").exists(), "its file", 120, job)
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**20))
            held = len(train_rows(out))
            threading.Timer(2, filler.unlink, [True]).start()
            text = job.communicate(timeout=120)[0]
        assert "not written" in text and held < 12, text
        if job.returncode == 0:  # room came in time for the last ones
            assert same(weights(out, 12), weights(tmp_path / "whole", 12))
        else:
            assert "make room and start again with --resume" in text
            run_command("distseg", "train", *settings(store, out, *words), "--resume")
            assert same(weights(out, 12), weights(tmp_path / "whole", 12))
        assert [row["step"] for row in train_rows(out)] == list(range(1, 13))


@pytest.mark.dist
def test_a_read_only_run_folder_is_one_line(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    with mounted(tmp_path / "disk", "ro") as disk:
        done = run_ranks(2, "train", *settings(store, disk / "run"), ok=False)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1 and "Read-only file system" in done.stderr


@pytest.mark.dist
@pytest.mark.slow(20)
def test_a_hang_leaves_every_ranks_stack_and_an_error_that_names_rank_step_and_phase(
    store: Path, tmp_path: Path, run_ranks: Run
) -> None:
    out = tmp_path / "run"
    words = settings(store, out, "train.timeout_s=6")
    done = run_ranks(2, "train", *words, launch=LAUNCHES["ddp"], ok=False, change=partial(changes.hang, "1", 3))
    assert done.returncode != 0  # or it would have timed out
    assert re.search(r"error: rank 0, step \d+, [a-z ]+: a rank is gone or did not answer", done.stderr), done.stderr
    assert "hanging" in (out / "stacks/rank1.txt").read_text() and (out / "stacks/rank0.txt").read_text()


@pytest.mark.slow(10)
def test_patience_ends_a_run_and_a_resume_knows_it(store: Path, tmp_path: Path, run_command: Run) -> None:
    words = settings(store, tmp_path / "run", "optim.lr=1e-12", "train.epochs=9", "train.patience=1")
    run_command("distseg", "train", *words)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["split"] for row in rows].count("val") == 2  # the first is the best there is
    run_command("distseg", "train", *words, "--resume")
    assert len(read_rows(tmp_path / "run/metrics.jsonl")) == len(rows)


@pytest.mark.slow(10)
def test_the_profiler_watches_the_steps_it_is_told_to(store: Path, tmp_path: Path, run_command: Run) -> None:
    words = settings(store, tmp_path / "run", "train.max_steps=3", "train.profile=steps:2-3")
    done = run_command("distseg", "train", *words)
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    assert (
        "Self CPU" in done.stdout
        and sum(event["name"] == "Optimizer.step#Adam.step" for event in trace["traceEvents"]) == 2
    )
    wrong = run_command("distseg", "train", *words[:-1], "train.profile=2-3", ok=False)
    assert "config train.profile: got 2-3; must be steps:FIRST-LAST" in wrong.stderr


def test_a_tracker_that_is_not_there_is_named(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    words = settings(store, tmp_path / "run", "train.trackers=[wandb]")
    done = run_ranks(1, "train", *words, ok=False, change=partial(changes.block, "wandb"))
    assert done.returncode == 1 and "error: train.trackers: got wandb, which is not installed" in done.stderr


@pytest.mark.dist
@pytest.mark.slow(120)
@pytest.mark.timeout(900)
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_one_that_was_not(store: Path, run_command: Run) -> None:
    """`python tests/faults.py STORE --kills 50` is the long one."""
    with started(sys.executable, "tests/faults.py", str(store), "--kills", "2", "--steps", "16") as job:
        text = job.communicate(timeout=800)[0]
    assert job.returncode == 0 and "2 kills" in text and "bit-equal to the undisturbed run" in text, text
