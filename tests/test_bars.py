"""Progress: a bar on a terminal, lines elsewhere."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distseg import bars
from distseg.bars import Bar, counted


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the time forward."""
    now = [100.0]
    monkeypatch.setattr("distseg.bars.time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def test_a_line_at_the_start_at_the_end_and_every_thirty_seconds(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in counted(range(60), "prepare", 60, "volume"):
        clock(4.0)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "prepare: 0/60 volumes",
        "prepare: 8/60 volumes, 0:03:28 left",
        "prepare: 16/60 volumes, 0:02:56 left",
    ]
    assert lines[-1] == "prepare: 60/60 volumes in 0:04:00" and len(lines) == 2 + 240 // 32


def test_work_that_is_brief_or_of_another_rank_says_nothing(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(counted(range(3), "measure", 3, "pair", brief=True)) == [0, 1, 2]
    assert list(counted("ab", "evaluate", 2, "volume", shown=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
    with Bar("1/2 chest", 100, "slice", brief=True) as bar:
        clock(40.0)
        bar.update(10)
    assert capsys.readouterr().err == "1/2 chest: 10/100 slices, 0:06:00 left\n"


def test_a_download_that_goes_on_tells_the_pace_of_this_attempt(
    clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with Bar("x.zip", None, "B") as bar:
        bar.set(50_000_000, 100_000_000)
        clock(31.0)
        bar.update(10_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["x.zip: 0.0 MB", "x.zip: 60.0 MB of 100.0 MB, 0:02:04 left"]
    assert lines[2].startswith("x.zip: 60.0 MB of 100.0 MB in 0:00:31")


def test_work_that_fails_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError):
        for n in counted([1, 0], "divide", 2, "number"):
            1 / n
    assert re.fullmatch(r"divide: 0/2 numbers\ndivide: 1/2 numbers in 0:00:0\d\n", capsys.readouterr().err)


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(counted(range(2), "prepare", 2, "volume")) == [0, 1]
    assert "prepare: 100%" in terminal.getvalue() and "\r" in terminal.getvalue()
    assert bars.EVERY_S >= 10


# What a job's log gets.


@pytest.mark.slow(10)
def test_no_command_writes_carriage_returns_where_there_is_no_terminal(
    small_run: Path, phantom: Path, tmp_path: Path, run_command: Callable[..., Any]
) -> None:
    run = shutil.copytree(small_run, tmp_path / "run")  # which gets rules
    volume = sorted((phantom / "COVID-19-CT-Seg_20cases").iterdir())[0]
    commands = {
        "phantom: 2/2 cases in": ("phantom", tmp_path / "set", "--cases", 2, "--size", 64, "--slices", 8),
        "prepare: 2/2 volumes in": ("prepare", tmp_path / "set", tmp_path / "store", "--folds", 2, "--workers", 1),
        "check: 2/2 volumes in": ("prepare", "--check", tmp_path / "store"),
        "tune all: ": ("evaluate", run, "--tune", "evaluate.bootstrap_resamples=10"),
        "measure Dice: ": ("export", run, tmp_path / "model"),
        "": ("predict", run, volume, tmp_path / "mask.nii.gz"),
    }
    for line, words in commands.items():
        done = run_command("distseg", *words)
        assert "\r" not in done.stderr + done.stdout and line in done.stderr, (words, done.stderr)
        assert all(said.strip() for said in done.stderr.splitlines())
