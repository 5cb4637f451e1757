"""Every file of launch/ is used or checked."""

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import yaml

from distseg.tables import read_rows
from tests.conftest import ROOT, SMALL

LAUNCH = ROOT / "launch"
Run = Callable[..., Any]


def test_launch_readme_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    assert [path.name for path in LAUNCH.iterdir() if path.name != "README.md" and path.name not in text] == []


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.name)
def test_launch_files_are_read_by_accelerate_and_hold_no_number_of_the_config(path: Path) -> None:
    from accelerate.commands.launch import load_config_from_file

    if path.name == "kubernetes.yaml":
        return
    read = load_config_from_file(str(path))
    assert read.num_machines == (2 if path.name == "nodes.yaml" else 1)
    assert read.mixed_precision == ("no" if read.use_cpu else "bf16")
    sections = [value for value in yaml.safe_load(path.read_text()).values() if isinstance(value, dict)]
    for section in sections:
        for key in {"gradient_accumulation_steps", "gradient_clipping"} & section.keys():
            assert section[key] == "auto"


@pytest.mark.parametrize(
    "name",
    ["torchrun.sh", "slurm.sbatch", "study.sbatch", "quickstart.sh", "setup_venv.sh", "setup_triton.sh", "nccl.env"],
)
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)


def test_each_variable_of_the_environment_has_its_reason_above_it_and_reaches_the_job() -> None:
    lines = (LAUNCH / "nccl.env").read_text().splitlines()
    names = {}
    for above, line in zip(lines, lines[1:], strict=False):
        if found := re.match(r': "\$\{(\w+):=(\w+)\}"', line):
            assert above.startswith("# ")
            names[found[1]] = found[2]
    clean = {key: value for key, value in os.environ.items() if key not in names}
    words = ["bash", "-c", f". {LAUNCH / 'nccl.env'}; env"]
    seen = subprocess.run(words, env=clean, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(names) >= 6 and all(f"{name}={value}" in seen for name, value in names.items())


class Strict(pydantic.BaseModel, extra="forbid"):
    """Of kubeflow.org/v1: a field that the operator does not know would be left out in silence."""


class Container(Strict):
    name: Literal["pytorch"]
    image: str
    workingDir: str
    command: list[str]
    env: list[dict[Literal["name", "value"], str]]
    resources: dict[Literal["limits", "requests"], dict[str, int | str]]
    volumeMounts: list[dict[Literal["name", "mountPath"], str]]


class Pod(Strict):
    terminationGracePeriodSeconds: int
    containers: list[Container]
    volumes: list[dict[Literal["name", "persistentVolumeClaim", "emptyDir"], Any]]


class Replica(Strict):
    replicas: int
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: dict[Literal["spec"], Pod]


class Elastic(Strict):
    rdzvBackend: Literal["c10d", "etcd", "etcd-v2"]
    minReplicas: int
    maxReplicas: int
    nProcPerNode: int
    maxRestarts: int


class Spec(Strict):
    runPolicy: dict[Literal["cleanPodPolicy"], Literal["Running", "All", "None"]]
    elasticPolicy: Elastic
    pytorchReplicaSpecs: dict[Literal["Master", "Worker"], Replica]


class Job(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: dict[Literal["name", "namespace", "labels"], Any]
    spec: Spec


def test_the_kubernetes_job_has_the_fields_of_the_operator_and_a_command_that_resumes() -> None:
    job = Job.model_validate(yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text()))
    worker = job.spec.pytorchReplicaSpecs["Worker"]
    pod = worker.template["spec"]
    assert job.spec.elasticPolicy.minReplicas <= worker.replicas <= job.spec.elasticPolicy.maxReplicas
    assert {mount["name"] for c in pod.containers for mount in c.volumeMounts} == {v["name"] for v in pod.volumes}
    command = pod.containers[0].command
    assert command[:2] == ["torchrun", "distseg/train.py"] and command[-1] == "--resume"
    environment = {variable["name"]: variable["value"] for variable in pod.containers[0].env}
    assert pod.terminationGracePeriodSeconds > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])


def small(store: Path, out: Path, steps: int) -> list[str]:
    return [*SMALL, f"data.store={store}", f"output_dir={out}", f"train.max_steps={steps}"]


@pytest.mark.dist
@pytest.mark.slow(25)
def test_torchrun_sh_goes_on(store: Path, tmp_path: Path, run_command: Run, run_ranks: Run) -> None:
    run_ranks(2, "train", *small(store, tmp_path / "run", 1))
    env = {"NPROC_PER_NODE": "2", "MIXED_PRECISION": "no"}
    done = run_command("bash", "launch/torchrun.sh", *small(store, tmp_path / "run", 2), env=env)
    assert "resumes after step 1" in done.stdout and "2 rank(s) on cpu, ddp, precision no" in done.stdout


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_slurm_job_that_fails_before_it_trains_is_not_requeued_for_an_older_marker(tmp_path: Path) -> None:
    stand_in(tmp_path, "srun", "exit 1")
    stand_in(
        tmp_path, "scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$*" >>{tmp_path / "asked"}; fi'
    )
    (tmp_path / "preempted.json").write_text("{}")
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "42"}
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    env = os.environ | slurm | {"PATH": path, "RUN": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT)}
    done = subprocess.run(["bash", "launch/slurm.sbatch"], cwd=ROOT, env=env, timeout=60)
    assert done.returncode == 1 and not (tmp_path / "asked").exists()


@pytest.mark.dist
@pytest.mark.slow(60)
def test_a_slurm_job_that_is_preempted_goes_back_into_the_queue_and_one_that_ends_does_not(
    store: Path, tmp_path: Path
) -> None:
    out, asked = tmp_path / "run", tmp_path / "asked"
    stand_in(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec env SLURM_NODEID=0 "$@"')
    stand_in(tmp_path, "scontrol", f'if [ "$1" = show ]; then echo localhost; else echo "$*" >>{asked}; fi')
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "42"}
    env = (
        os.environ
        | slurm
        | {"PATH": path, "RUN": str(out), "NPROC_PER_NODE": "2", "MIXED_PRECISION": "no", "PORT": "29517"}
    )
    env |= {"SLURM_SUBMIT_DIR": str(ROOT), "LOCAL_ADDR": "127.0.0.1"}

    def submitted(steps: int) -> subprocess.Popen[str]:
        words = ["bash", "launch/slurm.sbatch", *small(store, out, steps)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, cwd=ROOT, env=env, **pipes)

    job = submitted(400)
    end = time.monotonic() + 120
    while len(read_rows(out / "metrics.jsonl")) < 2:
        assert job.poll() is None and time.monotonic() < end, job.communicate()[0]
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    text = job.communicate(timeout=90)[0]
    assert asked.read_text() == "requeue 42\n" and (out / "preempted.json").exists(), text
    done = read_rows(out / "metrics.jsonl")[-1]["step"]
    job = submitted(done + 1)
    text = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and f"resumes after step {done}" in text, text
    assert asked.read_text() == "requeue 42\n" and not (out / "preempted.json").exists()
