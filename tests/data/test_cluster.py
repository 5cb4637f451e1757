"""Preparing a store on a real dask cluster over TCP: a worker that dies, a mistake far away, nobody there."""

import contextlib
import importlib.util
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import pytest

from distseg.data.prepare import FoldRule, prepare_store
from distseg.errors import DistsegError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="distributed is not installed")
FOLDS = FoldRule(n_folds=3)


@pytest.fixture
def source(phantom: Path, tmp_path: Path) -> Path:
    """The phantom three times over, so that a worker can be caught at work."""
    src = Path(shutil.copytree(phantom, tmp_path / "src"))
    for path in list(src.glob("*/*.nii.gz")):
        for turn in (1, 2):
            shutil.copy(path, path.with_name(f"again{turn}_{path.name}"))
    return src


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """Address of a scheduler on a free port of this machine."""
    file = tmp_path / "scheduler.json"
    words = ["dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file]
    with started(*words) as process:
        wait_until(lambda: file.is_file() or process.poll() is not None)
        yield json.loads(file.read_text())["address"]


@contextlib.contextmanager
def worker(address: str, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that is connected; without the nanny that would start another one in its place."""
    log = scratch.with_suffix(".log")
    words = ["dask_worker", address, "--no-nanny", "--no-dashboard", "--nthreads", 1, "--memory-limit", 0]
    with started(*words, "--local-directory", scratch, log=log) as process:
        wait_until(lambda: "Registered to" in log.read_text() or process.poll() is not None)
        yield process
