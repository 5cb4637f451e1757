"""Preparing a store on a real dask cluster over TCP: workers that are killed, a mistake far away, nobody there."""

import contextlib
import gzip
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from distseg.data.preparing import FoldRule, prepare_store
from distseg.errors import DistsegError
from tests.conftest import wait_until

pytestmark = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="distributed is not installed")
FOLDS = FoldRule(n_folds=3)
FAIL_AT_ONCE = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}  # workers that a volume may kill; usually 3


@pytest.fixture
def source(phantom: Path, tmp_path: Path) -> Path:
    """The phantom five times over, so that a worker can be caught at work."""
    src = Path(shutil.copytree(phantom, tmp_path / "src"))
    for path in list(src.glob("*/*.nii.gz")):
        for turn in range(4):
            content = gzip.compress(
                gzip.decompress(path.read_bytes()), mtime=turn
            )  # one image under two patients is refused
            path.with_name(f"again{turn}_{path.name}").write_bytes(content)
    return src


@contextlib.contextmanager
def started(
    log: Path, module: str, *words: object, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes to a log; gone at the end, whatever happens."""
    command = [sys.executable, "-m", module, *map(str, words)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (env or {}))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def scheduler(tmp_path: Path, **env: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A scheduler on a free port of this machine, and its address."""
    found = tmp_path / "scheduler.json"
    words = ["--host", "127.0.0.1", "--port", 0, "--dashboard-address", "127.0.0.1:0", "--no-dashboard"]
    log = tmp_path / "scheduler.log"
    with started(log, "distributed.cli.dask_scheduler", *words, "--scheduler-file", found, env=env) as process:
        wait_until(lambda: found.is_file() and found.read_text().endswith("}"), "the scheduler", 30, interval_s=0.005)
        yield process, json.loads(found.read_text())["address"]


@contextlib.contextmanager
def worker(address: str, tmp_path: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A connected worker, without the nanny that would start another in its place."""
    log = tmp_path / f"{name}.log"
    words = [address, "--no-nanny", "--no-dashboard", "--nthreads", 1, "--memory-limit", 0]
    with started(log, "distributed.cli.dask_worker", *words, "--local-directory", tmp_path / name) as process:
        wait_until(lambda: "Registered to" in log.read_text(), "the worker", 30, interval_s=0.005)
        yield process


@contextlib.contextmanager
def preparing(source: Path, root: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    words = ["prepare", source, root, "--folds", FOLDS.n_folds, "--cluster", address]
    with started(root.with_suffix(".log"), "distseg", *words) as process:
        yield process


def stop_while_writing(worker: subprocess.Popen[bytes], prepare: subprocess.Popen[bytes]) -> None:
    """Stops a worker when it has a file of an unfinished case open; it stands still while that is looked up."""
    process = psutil.Process(worker.pid)

    def stopped() -> bool:
        process.suspend()
        if any(".partial-" in file.path for file in process.open_files()):
            return True
        process.resume()
        return prepare.poll() is not None

    wait_until(stopped, "a file being written", 30, interval_s=0.005)
    assert prepare.poll() is None, "ended before its worker was caught"


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_worker_that_is_killed_while_it_writes_loses_nothing(source: Path, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    prepare_store(source, local, FOLDS, workers=2)
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, "victim") as victim,
        worker(address, tmp_path, "other"),
        preparing(source, remote, address) as prepare,
    ):
        stop_while_writing(victim, prepare)
        victim.kill()
        assert not remote.exists() and list(tmp_path.glob(".preparing-remote/slices/*/.partial-*"))
        status = prepare.wait(60)
    output = remote.with_suffix(".log").read_text()
    assert status == 0 and "30 volumes" in output and "Traceback" not in output and "ERROR" not in output
    assert content(remote) == content(local)
    assert not list(remote.rglob(".*")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("killed", "message"),
    [
        ("worker", "error: --cluster: got a volume whose workers died (1 of them,"),
        ("scheduler", "error: --cluster: lost the scheduler tcp://"),
    ],
)
def test_a_cluster_that_is_lost_ends_the_command_and_keeps_finished_volumes(
    killed: str, message: str, source: Path, tmp_path: Path
) -> None:
    with (
        scheduler(tmp_path, **FAIL_AT_ONCE) as (scheduling, address),
        worker(address, tmp_path, "worker") as writing,
        preparing(source, tmp_path / "store", address) as prepare,
    ):
        finished = (tmp_path / ".preparing-store" / "slices").glob
        wait_until(lambda: any(finished("*/phantom_*")), "the first case", 30, interval_s=0.005)
        stop_while_writing(writing, prepare)
        (writing if killed == "worker" else scheduling).kill()
        assert prepare.wait(30) == 1
    output = (tmp_path / "store.log").read_text()
    assert message in output.splitlines()[-1] and "Traceback" not in output
    assert not (tmp_path / "store").exists() and any(finished("*/phantom_*"))


def test_a_mistake_in_a_volume_comes_back_from_a_worker_as_one_line(source: Path, tmp_path: Path) -> None:
    path = source / "Infection_Mask" / "phantom_002.nii.gz"
    mask = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj) + 7, mask.affine), path)
    with (
        scheduler(tmp_path) as (_, address),
        worker(address, tmp_path, "worker"),
        pytest.raises(DistsegError, match=f"mask {path}: got value 7; declared are") as caught,
    ):
        prepare_store(source, tmp_path / "store", FOLDS, cluster=address)
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()
    assert (tmp_path / "worker.log").read_text().count("Compute Failed") == 1  # to read it again would not help


def test_an_address_without_a_scheduler_is_one_line(source: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(DistsegError, match=f"--cluster: got {address}; no dask scheduler answers there") as caught:
        prepare_store(source, tmp_path / "store", FOLDS, cluster=address)
    assert time.monotonic() - start < 20
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("*store*"))
