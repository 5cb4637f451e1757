"""`distseg doctor`: one screen, whatever is missing or broken."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distseg.doctor import main

Run = Callable[..., Any]
JOBS = ("train", "train, ZeRO", "export", "export, ONNX", "serve", "client", "cpp")


def test_a_machine_that_can_train_is_said_to_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and all(len(line) < 160 for line in lines)
    said = {line[:13].strip(): line[13:] for line in lines}
    assert torch.__version__ in said["torch"] and "cores" in said["machine"] and "/dev/shm" in said["machine"]
    assert said["train"] == "ready" and all(job in said for job in JOBS)
    assert "gpu 0" in said if torch.cuda.is_available() else "runs on the CPU" in said["gpu"]
    assert said["loss kernel"].startswith("triton" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("change", "status", "seen"),
    [
        (
            "sys.modules['nvidia.dali'] = None",
            1,
            ["dali         not installed", "train        not ready: pip install -e ."],
        ),
        ("sys.modules['torch'] = None", 1, ["torch        not installed", "export       not ready: pip install -e ."]),
        (
            "os.environ['PATH'] = '/nowhere'",
            0,
            ["g++ missing, cmake missing", "cpp          not ready: apt-get install g++"],
        ),
    ],
    ids=["dali", "torch", "compiler"],
)
def test_what_is_missing_has_a_remedy_and_no_traceback(change: str, status: int, seen: list[str]) -> None:
    script = f"import os, sys; {change}; from distseg.doctor import main; sys.exit(main([]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == status and done.stderr == ""
    for line in seen:
        assert line in done.stdout


def test_a_broken_package_is_said_to_be(tmp_path: Path, run_command: Run) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = run_command("distseg", "doctor", ok=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch        broken (libcudart.so.13: cannot open shared object file)" in done.stdout
