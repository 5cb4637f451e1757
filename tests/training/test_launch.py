"""The same run however it is launched, exact resume, and launches that would train apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from distseg.config_files import load_config
from distseg.errors import DistsegError
from distseg.files import sha256_of, write_json
from distseg.ranks import check_world
from distseg.tables import read_rows
from tests import warm
from tests.conftest import LAUNCHES, SMALL

Run = Callable[..., Any]
# Synchronised batch norm makes the maths of N ranks that of one; what is left is the order of float32 sums, which a
# freshly initialised network and Adam amplify. In float64 the same comparison ends at 1e-10 (tests/test_losses_over_ranks.py).
LOSS_TOLERANCE = 2e-3
PLAIN = ["optim.lr=1e-4", "data.log_samples=true"]
CPU_RANKS = ["accelerate", "launch", "--config_file", "launch/cpu.yaml", "--num_processes"]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]


def samples(run: Path) -> list[tuple[int, int, str, str]]:
    rows = [row for path in (run / "samples").glob("rank*.jsonl") for row in read_rows(path)]
    return sorted((row["epoch"], row["step"], row["sample"], row["sha256"]) for row in rows)


@pytest.mark.dist
@pytest.mark.slow(60)
def test_every_way_to_launch_gives_the_same_losses_and_samples(store: Path, tmp_path: Path, run_command: Run) -> None:
    script = ["distseg/train.py"]
    ways = {
        "command": (["distseg", "train"], 4),  # forked
        "module": (["python", "-m", "distseg.train"], 4),
        "torchrun": (["torchrun", "--nproc_per_node", "2", *script], 2),
        "accelerate": ([*CPU_RANKS, "2", *script], 2),
    }
    for name, (launcher, batch) in ways.items():
        settings = [*SMALL, *PLAIN, f"data.store={store}", f"train.batch_size_per_rank={batch}", "train.max_steps=5"]
        run_command(*launcher, *settings, f"output_dir={tmp_path / name}")
    expected = losses(tmp_path / "command")
    assert len(expected) == 5 and losses(tmp_path / "module") == expected
    for name in ("torchrun", "accelerate"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=LOSS_TOLERANCE)
        assert losses(tmp_path / name)[0] == pytest.approx(expected[0], abs=1e-5)
    assert losses(tmp_path / "torchrun") == losses(tmp_path / "accelerate")
    assert (
        samples(tmp_path / "command") == samples(tmp_path / "accelerate") and len(samples(tmp_path / "command")) == 20
    )


@pytest.mark.dist
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    settings = [*SMALL, *PLAIN, f"data.store={store}", "train.batch_size_per_rank=2", "checkpoint.every_steps=2"]
    words = ["train", *settings]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, *words, "train.max_steps=8", f"output_dir={whole}")
    run_ranks(2, *words, "train.max_steps=4", f"output_dir={parts}")
    # What a crash after the checkpoint leaves: lines of steps that will be done again.
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "split": "train", "loss": 9.0}) + '\n{"step": 6, "spl')
    resumed = run_ranks(2, *words, "train.max_steps=8", f"output_dir={parts}", "--resume")
    assert "resumes after step 4" in resumed.stdout
    assert losses(parts) == losses(whole) and len(losses(parts)) == 8
    assert samples(parts) == samples(whole)
    one, other = (load_file(run / "checkpoints/step_8/weights.safetensors") for run in (whole, parts))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_best_weights_and_the_tables_of_a_run_are_there(small_run: Path) -> None:
    rows = read_rows(small_run / "metrics.jsonl")
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert (small_run / "score_list.csv").read_text().startswith("epoch,step,loss,mean_dice,dice_lung,dice_infection\n")
    for name in (
        "config.yaml",
        "environment.json",
        "best/weights.safetensors",
        "figures/overlays.png",
    ):
        assert (small_run / name).stat().st_size > 0
    assert load_config(small_run / "config.yaml").train.max_steps == 6
    assert list((small_run / "tensorboard").rglob("events*"))
    assert not list(small_run.rglob(".*"))


def test_a_run_is_not_overwritten_and_resumes_only_as_itself(
    small_run: Path, store: Path, tmp_path: Path, run_command: Run
) -> None:
    copy = Path(shutil.copytree(small_run, tmp_path / "run"))
    settings = [*SMALL, f"data.store={store}", f"output_dir={copy}", "train.max_steps=6"]
    again = run_command("distseg", "train", *settings, ok=False)
    assert again.returncode == 1 and "holds a run already" in again.stderr
    other = run_command("distseg", "train", *settings, "optim.lr=1", "--resume", ok=False)
    assert other.returncode == 1 and "optim.lr (0.0001 -> 1.0)" in other.stderr


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(store: Path, tmp_path: Path, run_command: Run) -> None:
    settings = [*SMALL, f"data.store={store}", f"output_dir={tmp_path / 'run'}", "train.max_steps=1"]
    done = run_command("distseg", "train", *settings, "--resume")
    assert "no complete checkpoint there" in done.stdout
    assert "\nstep 1/1  loss " in f"\n{done.stderr}" and "\r" not in done.stderr  # a log file gets lines, not a bar


@pytest.mark.dist
def test_accelerate_that_would_start_one_process_for_two_is_refused(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    words = ["accelerate", "launch", "--cpu", "--num_processes", "2", "distseg/train.py"]
    done = run_command(*words, *SMALL, f"data.store={store}", f"output_dir={tmp_path / 'run'}", ok=False)
    assert done.returncode != 0 and "accelerate launch was asked for 2" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.dist
def test_a_mistake_is_one_line_on_two_ranks_too(tmp_path: Path, run_ranks: Run) -> None:
    words = ["train", "data.store=/nowhere", f"output_dir={tmp_path / 'run'}"]
    done = run_ranks(2, *words, launch=LAUNCHES["ddp"], ok=False)
    assert done.returncode != 0 and done.stderr.count("error: store: got /nowhere without store.json") == 1
    assert "[rank1]" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_each_node_says_what_is_wrong_with_it(local_rank: str, lines: int, tmp_path: Path, run_command: Run) -> None:
    """The first rank of a second node: the first node may have what it lacks."""
    words = ["distseg", "train", "data.store=/nowhere", f"output_dir={tmp_path / 'run'}"]
    done = run_command(*words, ok=False, env={"RANK": "2", "LOCAL_RANK": local_rank})
    assert done.returncode == 1 and done.stderr.count("error: store: got /nowhere without store.json") == lines


def test_what_one_rank_alone_cannot_do_is_one_line(store: Path, tmp_path: Path, run_ranks: Run) -> None:
    """Each rank has its node's disk for a cache; the others must not wait for one that has no room."""
    words = [*SMALL, f"data.store={store}", "data.cache_dir=/proc/distseg", f"output_dir={tmp_path / 'run'}"]
    done = run_ranks(2, "train", *words, ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line.lower()] == [
        "error: file: got /proc/distseg; No such file or directory; mend it, or choose another place"
    ]


def test_ranks_that_do_not_know_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import DistributedType

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistsegError, match="got 2 processes of which 1 are connected"):
        check_world(1, DistributedType.NO)
    with pytest.raises(DistsegError, match="would train apart"):
        check_world(2, DistributedType.NO)
    with pytest.raises(DistsegError, match="got strategy FSDP"):
        check_world(2, DistributedType.FSDP)


def test_parameters_that_differ_are_found(tmp_path: Path) -> None:
    warm.run_function(2, differing_rank, str(tmp_path / "rendezvous"))


def differing_rank(rank: int, rendezvous: str) -> None:
    import torch.distributed as dist

    from distseg.ranks import check_same_parameters

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    check_same_parameters(layer)
    with torch.no_grad():
        layer.bias[1] += 1e-6 * rank
    with pytest.raises(DistsegError, match=r"parameters of rank\(s\) \[1\] differ from rank 0"):
        check_same_parameters(layer)
    dist.destroy_process_group()


def test_a_checkpoint_of_an_earlier_format_is_refused_not_half_read(
    small_run: Path, store: Path, tmp_path: Path, run_command: Run
) -> None:
    out = shutil.copytree(small_run, tmp_path / "run")
    newest = max((out / "checkpoints").iterdir(), key=lambda folder: int(folder.name.split("_")[-1]))
    torch.save({"optimizer": {"state": {0: {}}, "param_groups": []}}, newest / "optimizer.pt")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["sha256"]["optimizer.pt"] = sha256_of(newest / "optimizer.pt")
    write_json(newest / "manifest.json", manifest)
    settings = [*SMALL, f"data.store={store}", "train.max_steps=8", f"output_dir={out}"]
    done = run_command("distseg", "train", *settings, "--resume", ok=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "which is no parameter; it is of an earlier distseg" in done.stderr
    assert losses(out) == losses(small_run)
