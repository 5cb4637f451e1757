"""`distseg doctor`: one screen, whatever is missing or broken."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distseg.commands.doctor import JOBS, check_dali, main
from distseg.packages import DALI_BUILDS, EXTRA_OF, installed_version

Run = Callable[..., Any]
EXTRAS = [*EXTRA_OF, "nvidia.dali"]


def test_a_machine_that_can_train_is_said_to_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and all(len(line) < 160 for line in lines)
    said = {line[:13].strip(): line[13:] for line in lines}
    assert torch.__version__ in said["torch"] and "cores" in said["machine"] and "/dev/shm" in said["machine"]
    assert said["train"] == "ready" and all(job in said for job in JOBS)
    assert "gpu 0" in said if torch.cuda.is_available() else "runs on the CPU" in said["gpu"]
    assert said["loss kernel"].startswith("triton" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("missing", "words", "status", "seen"),
    [
        (
            EXTRAS,
            [],
            0,
            [
                "predict      ready",
                "train        not installed: pip install 'distseg[train]'",
                "zero         not installed: pip install 'distseg[train,zero]'",
            ],
        ),
        (["nvidia.dali"], ["predict"], 0, ["train        not installed: pip install 'distseg[train]'"]),
        (["nvidia.dali"], ["predict", "train"], 1, ["dali         not installed"]),
        (["torch"], [], 1, ["torch        not installed", "predict      not installed: pip install distseg"]),
    ],
    ids=["core", "dali", "dali asked for", "torch"],
)
def test_what_is_missing_names_its_extra_and_fails_only_where_it_is_needed(
    missing: list[str],
    words: list[str],
    status: int,
    seen: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert main(words) == status
    said = capsys.readouterr().out.splitlines()
    assert [line for line in seen if line not in said] == []


def test_without_a_compiler_all_but_cpp_is_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["train"]) == 0
    said = capsys.readouterr().out
    assert "g++ missing, cmake missing" in said and "cpp          not installed: apt-get install g++" in said


def test_a_job_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "JOB: got 'trian'; it must be one of predict, train" in capsys.readouterr().err


def test_where_dali_does_not_exist_the_remedy_is_another_system(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main([]) == 0
    assert "train        not installed: use Linux: dali exists for it alone" in capsys.readouterr().out


def test_dali_and_torch_of_different_cuda_are_named_and_stop_nothing() -> None:
    (of_dali,) = (build[len("nvidia-dali-cuda") :][:2] for build in DALI_BUILDS if installed_version(build))
    of_torch = {"12": "13", "13": "12"}[of_dali]
    found = check_dali(SimpleNamespace(version=SimpleNamespace(cuda=f"{of_torch}.0")))
    assert f"for CUDA {of_dali}, torch for CUDA {of_torch}: they work together" in found.text
    assert not (found.remedy or found.extra or found.is_broken)


def test_two_builds_of_dali_in_one_folder_are_wrong(tmp_path: Path, run_command: Run) -> None:
    for name in DALI_BUILDS:
        folder = tmp_path / f"{name.replace('-', '_')}-2.4.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.4.0\n")
    done = run_command(sys.executable, "-m", "distseg", "doctor", ok=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and f"train        not ready: pip uninstall {' '.join(DALI_BUILDS)}" in done.stdout


def test_a_broken_package_is_said_to_be(tmp_path: Path, run_command: Run) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = run_command(sys.executable, "-m", "distseg", "doctor", ok=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "torch        broken (libcudart.so.13: cannot open shared object file)" in done.stdout
