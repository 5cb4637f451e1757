"""A study end to end: failures apart, nothing done twice, killed and started again, on SLURM and dask."""

import contextlib
import csv
import dataclasses
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from distseg.errors import DistsegError
from distseg.files import locked
from distseg.reporting.study_page import study_page
from distseg.studies import executors
from distseg.studies.executors import array_of, gpu_slots
from distseg.studies.grid import changed_keys, load_study
from distseg.studies.running import alone, begin, run_study, with_store
from distseg.studies.task import MARK, State, do_task, last_error, task_of, write_config
from distseg.tables import read_rows
from tests.conftest import ROOT, SCRIPTS_FIRST, SMALL, wait_until
from tests.data.test_cluster import scheduler, worker

Run = Callable[..., Any]
TIMES = ("training_s", "slices_per_s")
GOOD, BAD, ADDED = (
    f"unetplusplus_{name}_seed0" for name in ("gernet_s_fold1", "no_such_encoder_fold1", "gernet_s_fold2")
)


def write_study(folder: Path, store: Path, *overrides: str, **keys: Any) -> Path:
    """A study of one encoder, one decoder and two steps; `keys` change it."""
    training = [word for word in SMALL if not word.startswith("model.encoder=")]
    values = {
        "base": str(ROOT / "yaml_configs/quickstart.yaml"),
        "encoders": ["gernet_s"],
        "decoders": ["unetplusplus"],
        "folds": [1],  # its patient has an infection
        "overrides": [*training, f"data.store={store}", "train.max_steps=2", "train.trackers=[]", *overrides],
        "output_dir": str(folder / "study"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values | keys))
    return path


def results(root: Path) -> list[dict[str, str]]:
    with (root / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(root: Path) -> list[dict[str, str]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in results(root)]


@pytest.fixture(scope="module")
def first(store: Path, tmp_path_factory: pytest.TempPathFactory, run_command: Run) -> tuple[Path, Any]:
    """A study of an encoder and one that does not exist, after its first start; its YAML and what was said."""
    path = write_study(tmp_path_factory.mktemp("study"), store, encoders=["gernet_s", "no_such_encoder"], workers=2)
    return path, run_command("distseg", "study", path, ok=False)


@pytest.fixture(scope="module")
def study(first: tuple[Path, Any], run_command: Run) -> tuple[Path, str]:
    """The same without the one that does not exist, and with another fold: its YAML and the first log of before."""
    path, _ = first
    log = (path.parent / "study" / "logs" / f"{GOOD}.log").read_text()
    run_command("distseg", "study", path, "encoders=[gernet_s]", "folds=[1, 2]")
    return path, log


def redo_scores(study: tuple[Path, str], to: Path) -> tuple[Any, Path]:
    """A copy of the finished study in which the run of fold 2 is trained and not scored: cheap work for an executor."""
    path, _ = study
    root = Path(shutil.copytree(path.parent / "study", to / "study"))
    shutil.rmtree(root / "runs" / ADDED / "eval")
    return load_study(path, ["encoders=[gernet_s]", "folds=[1, 2]", f"output_dir={root}"]), root


@pytest.mark.dist
def test_a_run_that_fails_is_told_with_its_error_and_its_log_and_the_others_are_done(first: tuple[Path, Any]) -> None:
    path, done = first
    root = path.parent / "study"
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{root}: 2 runs (2 encoders x 1 decoder x 1 fold x 1 seed), 0 done, 2 to do"
    assert f"{GOOD} starts on this machine (log {root}/logs/{GOOD}.log)" in lines
    assert any(line.startswith(f"{GOOD} done in 0:0") and "infection Dice 0." in line for line in lines)
    assert lines[-1].startswith(f"failed: {BAD}: training: model.encoder: got 'no_such_encoder'; must be a timm model")
    assert lines[-1].endswith(f"(log {root}/logs/{BAD}.log)")
    assert "accelerate launch --config_file" in (root / "logs" / f"{BAD}.log").read_text()


@pytest.mark.dist
def test_a_fold_that_is_added_is_trained_alone_and_pooled_with_the_others(study: tuple[Path, str]) -> None:
    path, log = study
    root = path.parent / "study"
    assert (root / "logs" / f"{GOOD}.log").read_text() == log  # not a word more: nothing was done again
    rows = results(root)
    assert [(row["encoder"], row["fold"], row["status"]) for row in rows] == [("gernet_s", n, "done") for n in "12"]
    for row in rows:
        assert float(row["parameters_m"]) > 1 and float(row["gmacs"]) > 0.01
        assert float(row["training_s"]) > 0 and float(row["slices_per_s"]) > 0
    paths = root.glob("runs/*_fold*/eval/val/per_case.csv")
    cases = [case for path in paths for case in csv.DictReader(path.read_text().splitlines())]
    mean = np.mean([float(case["lung_dice"]) for case in cases])
    table = (root / "table.md").read_text()
    assert len(cases) == 4 and f"| gernet_s | **{mean:.3f}** (" in table.partition("## infection")[0]
    page, _ = study_page(root)
    for chart in ("Mean Dice", "Cost against Dice", "Learning"):
        assert page.count(f"<figcaption>{chart}, ") == 2, chart  # of two regions
    assert not list(root.rglob(".*")) and not (root / "lock").exists()


def test_a_changed_configuration_is_refused_and_names_the_keys(study: tuple[Path, str]) -> None:
    path, _ = study
    same = ["encoders=[gernet_s]", "folds=[1, 2]"]
    paced = [*same, "executor=slurm", "data.num_threads=3", "checkpoint.keep_last=9", "seeds=[0, 1]"]
    begin(with_store(load_study(path, paced)))
    with pytest.raises(DistsegError) as caught:
        begin(with_store(load_study(path, [*same, "optim.lr=1", "model.encoder_weights=x", "processes_per_run=2"])))
    expected = "model.encoder_weights (None -> x), optim.lr (0.004 -> 1), processes_per_run (1 -> 2); its runs stay"
    assert expected in str(caught.value).replace("1.0", "1")
    begin(with_store(load_study(path, same)))


def test_another_process_on_the_same_folder_is_refused(study: tuple[Path, str]) -> None:
    loaded = load_study(study[0])
    with alone(loaded), pytest.raises(DistsegError, match=f"which process {os.getpid()} on .* works on; wait"):
        run_study(loaded)


def test_a_run_that_another_process_works_on_is_left_alone(study: tuple[Path, str]) -> None:
    loaded = load_study(study[0])
    task = task_of(loaded, loaded.runs[0])
    before = task.read_state()
    with locked(task.log.with_suffix(".lock"), "", "process 7 on another node"):
        outcome = do_task(task)
    assert outcome.error == "process 7 on another node works on it; wait for that one" and task.read_state() == before


def test_a_run_that_is_scored_has_its_cost(
    study: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill after the last score leaves nothing open: the run would not be taken up again."""
    loaded = load_study(study[0])
    task = dataclasses.replace(task_of(loaded, loaded.runs[0]), root=tmp_path)
    write_config(task, loaded.runs[0])
    task.run.mkdir(parents=True)
    (task.run / "config.yaml").touch()
    task.write_state(State(task.fingerprint, trained=True))
    killed = unittest.mock.Mock(side_effect=DistsegError("killed"))
    monkeypatch.setattr("distseg.studies.task._finish", killed)
    assert do_task(task).error == "killed" and killed.call_args.args[-1] == "scoring val"
    assert (task.read_state().gmacs or 0) > 0.01


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.dist
def test_slurm_gets_an_array_of_what_is_not_done_and_the_study_waits_for_it(
    study: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = without_times(study[0].parent / "study")
    loaded, root = redo_scores(study, tmp_path)
    job = 'while [[ $1 == --* ]]; do shift; done\nSLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_JOB_ID=42 setsid bash "$@" &>/dev/null &'
    stand_in(tmp_path, "sbatch", f'echo "$@" >{tmp_path}/asked\n{job}\necho $! >{tmp_path}/pid\necho "42;cluster"')
    silent = f'[ -e {tmp_path}/asked_once ] || {{ touch {tmp_path}/asked_once; echo "Unable to contact slurm controller" >&2; exit 1; }}'
    gone = '{ echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }'
    stand_in(tmp_path, "squeue", f"{silent}\nkill -0 $(cat {tmp_path}/pid) && echo 42_1 || {gone}")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(executors, "SQUEUE_S", 0.5)
    settings = dataclasses.replace(loaded.settings, executor="slurm", sbatch_options=("--partition=gpu",))
    assert run_study(dataclasses.replace(loaded, settings=settings)) == 0
    words = (tmp_path / "asked").read_text().split()
    assert words[:3] == ["--parsable", "--array=1", "--gpus-per-node=1"] and "--partition=gpu" in words
    assert words[-2:] == [str(ROOT / "launch/study.sbatch"), str(root / "study.yaml")]
    said = capsys.readouterr().out
    assert "submitted as SLURM job 42" in said and f"{ADDED} done in" in said
    assert without_times(root) == expected and not (root / "slurm.json").exists()


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="distributed is not installed")
@pytest.mark.dist
@pytest.mark.slow(40)
def test_a_dask_cluster_does_what_is_not_done(
    study: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = without_times(study[0].parent / "study")
    loaded, root = redo_scores(study, tmp_path)
    with scheduler(tmp_path) as (_, address), worker(address, tmp_path, "worker"):
        settings = dataclasses.replace(loaded.settings, executor=address)
        assert run_study(dataclasses.replace(loaded, settings=settings)) == 0
    assert f"{ADDED} done in" in capsys.readouterr().out and without_times(root) == expected


def test_a_job_that_slurm_preempts_goes_back_into_the_queue_and_one_that_fails_does_not(tmp_path: Path) -> None:
    stand_in(tmp_path, "scontrol", f'echo "$*" >>{tmp_path}/asked')
    slurm = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "42", "SLURM_SUBMIT_DIR": str(ROOT)}
    env = os.environ | slurm | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    stand_in(tmp_path, "distseg", "exit 1")
    assert subprocess.run(["bash", "launch/study.sbatch", "x.yaml"], cwd=ROOT, env=env, timeout=30).returncode == 1
    assert not (tmp_path / "asked").exists()
    stand_in(tmp_path, "distseg", f"trap 'exit 143' TERM\necho \"$@\" >{tmp_path}/words\nwhile :; do sleep 0.1; done")
    job = subprocess.Popen(["bash", "launch/study.sbatch", "x.yaml"], cwd=ROOT, env=env)
    wait_until(lambda: (tmp_path / "words").exists(), "the job", 120, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143 and (tmp_path / "asked").read_text() == "requeue 42_3\n"
    assert (tmp_path / "words").read_text() == "study x.yaml --only 3\n"


@pytest.mark.dist
@pytest.mark.slow(120)
def test_a_study_that_was_stopped_and_then_killed_ends_with_the_results_of_one_that_nobody_disturbed(
    store: Path, tmp_path: Path, run_command: Run
) -> None:
    changes = ["train.max_steps=12", "checkpoint.every_steps=1"]
    launch = {"whole": "python", "parts": None}  # the launcher matters where it is stopped
    paths = {name: write_study(tmp_path / name, store, *changes, launch=launch[name]) for name in launch}
    run_command("distseg", "study", paths["whole"])
    root = tmp_path / "parts" / "study"
    run = root / "runs" / GOOD
    env = os.environ | {"PATH": SCRIPTS_FIRST}

    def start() -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["distseg", "study", paths["parts"]], cwd=ROOT, env=env, **pipes)

    stopped = start()
    wait_until(lambda: len(read_rows(run / "metrics.jsonl")) >= 2, "two steps", 120, stopped)
    stopped.send_signal(signal.SIGTERM)
    said = stopped.communicate(timeout=120)[0]
    assert stopped.returncode == 143 and "stopped by SIGTERM; started again, it goes on" in said
    before = len(read_rows(run / "metrics.jsonl"))
    assert 2 <= before < 12 and (run / "preempted.json").exists()
    killed = start()
    wait_until(lambda: len(read_rows(run / "metrics.jsonl")) > before, "a step", 120, killed)
    killed.kill()
    killed.communicate()
    assert ranks_of(run)  # they outlive it
    done = run_command("distseg", "study", paths["parts"])
    assert f"{run.name} goes on on this machine" in done.stdout and not ranks_of(run)
    assert "resumes after step" in (root / "logs" / f"{run.name}.log").read_text()
    assert without_times(root) == without_times(tmp_path / "whole" / "study")
    steps = [row["step"] for row in read_rows(run / "metrics.jsonl") if row["split"] == "train"]
    assert steps == list(range(1, 13))


def ranks_of(run: Path) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={run}".encode() in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("encodrs=[a]", "study key: got encodrs; no such key; did you mean encoders?"),
        ("epochs=2", "study key: got epochs; no such key; did you mean train.epochs?"),
        ("train.epcohs=2", "config key: got train.epcohs; no such key; did you mean train.epochs?"),
        ("decoders=[unet]", "study decoders: got 'unet'; must be unetplusplus,"),
        ("decoders=[unetplus, unetplusplus]", "two runs would share a folder"),
        ("folds=[]", "study folds: got []; must be a list of one or more, each there once; see "),
        ("seeds=[1, 1]", "study seeds: got [1, 1]; must be a list of one or more, each there once"),
        ("workers=many", "study workers: got 'many'; must be an integer of at least 1, or null; see "),
        (
            "executor=slrum",
            "study executor: got 'slrum'; must be local, slurm or tcp://host:port of a dask scheduler; did",
        ),
        ("model.encoder=gernet_s", "study override: got model.encoder; the study sets it"),
        ("data.fold=1", "study override: got data.fold; the study sets it"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(override: str, message: str) -> None:
    with pytest.raises(DistsegError) as caught:
        _ = load_study(ROOT / "yaml_configs/study.yaml", [override]).runs
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_shipped_study_is_the_protocol_that_was_published() -> None:
    runs = load_study(ROOT / "yaml_configs/study.yaml").runs
    pairs = {(run.config.model.encoder, run.config.model.decoder) for run in runs}
    encoders, decoders = {pair[0] for pair in pairs}, {pair[1] for pair in pairs}
    assert len(runs) == len(pairs) == 12 and encoders == {"densenet161", "densenet201", "gernet_l", "senet154"}
    assert decoders == {"unetplusplus", "deeplabv3", "deeplabv3plus"}
    for config in (run.config for run in runs):
        assert (config.optim.name, config.optim.lr, config.train.epochs) == ("adam", 1e-4, 100)
        assert (config.train.batch_size_per_rank, config.loss.bce_weight, config.loss.dice_weight) == (2, 1, 1)


def test_a_resolved_study_reads_back_equal_and_overrides_may_be_a_mapping(tmp_path: Path) -> None:
    overrides = {"train": {"max_steps": 3}, "data.image_size": 64, "regions": {"lung": [1, 2]}, "optim.lr": 1e-5}
    loaded = load_study(write_study(tmp_path, Path("store"), overrides=overrides, launch="x {processes}"))
    assert loaded.base.train.max_steps == 3 and loaded.base.optim.lr == 1e-5
    assert dict(loaded.base.regions) == {"lung": (1, 2)} and loaded.settings.launch_words == ("x", "1")
    (tmp_path / "again.yaml").write_text(loaded.as_yaml())
    again = load_study(tmp_path / "again.yaml")
    assert again.runs == loaded.runs and changed_keys(loaded.to_dict(), again.to_dict()) == []


def test_where_a_run_lies_and_how_it_is_read_do_not_make_it_another_one(tmp_path: Path) -> None:
    path = write_study(tmp_path, Path("store"))
    (run,) = load_study(path).runs
    (moved,) = load_study(path, ["output_dir=elsewhere", "data.num_threads=7", "workers=3"]).runs
    (other,) = load_study(path, ["optim.lr=1"]).runs
    assert run.fingerprint == moved.fingerprint != other.fingerprint
    assert task_of(load_study(path), run).status() == "pending"


def test_gpus_are_dealt_out_in_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_study(ROOT / "yaml_configs/study.yaml", ["processes_per_run=2"]).settings
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_slots(settings) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4,3")
    assert gpu_slots(settings) == ["7,6", "5,4"]
    assert gpu_slots(dataclasses.replace(settings, workers=1)) == ["7,6"]
    with pytest.raises(DistsegError, match="processes_per_run: got 8; this machine has 5"):
        gpu_slots(dataclasses.replace(settings, processes_per_run=8))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpu_slots(settings) == [None] and gpu_slots(dataclasses.replace(settings, workers=2)) == [None, None]


def test_the_error_of_a_log_is_the_commands_own_not_its_launchers() -> None:
    launcher = "Traceback (most recent call last):\n  ...\ntorch.x.ChildFailedError: \n=====\nexitcode: 1\n====="
    assert last_error(f"step 1\nerror: store: got x; no\n{launcher}") == "store: got x; no"
    assert last_error(f"[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n{launcher}").startswith("torch.OutOfMem")
    assert last_error("runs/x: stopped by SIGTERM after step 4, which is saved\n").startswith("runs/x: stopped by SIG")
    assert last_error("Killed\n") == "Killed" and last_error("") == "it said nothing"
    assert array_of([0, 1, 2, 3]) == "0-3" and array_of([7, 1, 2, 4]) == "1-2,4,7"
