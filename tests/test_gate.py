"""What the gate promises of itself."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import warm
from tests.conftest import ROOT


def check_one_thread(rank: int) -> None:
    assert torch.get_num_threads() == 1


def test_a_worker_and_what_it_forks_and_starts_have_one_thread() -> None:
    """Two workers of two threads each on two cores last three times as long."""
    check_one_thread(0)
    warm.run_function(1, check_one_thread)
    code = "import torch; print(torch.get_num_threads())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


def test_a_slow_test_says_how_slow_it_is(request: pytest.FixtureRequest) -> None:
    marks = [mark for item in request.session.items for mark in item.iter_markers("slow")]
    assert all(len(mark.args) == 1 and mark.args[0] >= 5 for mark in marks)


def test_a_rank_that_fails_ends_the_others_and_its_status_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test that waits for a rank that is gone would last as long as its limit, and say less."""
    monkeypatch.setattr(warm, "AFTER_FAILURE_S", 0.2)
    assert warm.run_ranks(2, ["doctor"], tmp_path, ROOT, 60, change=end_rank_0).returncode == 7


def end_rank_0() -> None:
    if os.environ["RANK"] == "0":
        os._exit(7)
    time.sleep(600)
