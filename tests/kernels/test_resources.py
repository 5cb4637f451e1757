"""The kernels compile for GPUs that are not here, without spills, within a budget of registers, with wide loads."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REGISTERS = {"forward": 128, "backward": 64}  # a thread of 256: at least 2 and 4 blocks a multiprocessor


@pytest.mark.slow(60)
def test_no_spills_few_registers_and_loads_of_128_bits(run_command: Callable) -> None:
    done = run_command(sys.executable, Path(__file__).with_name("resources.py"))
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {row["arch"] for row in rows} == {80, 90, 100}
    for row in rows:
        assert row["spilled bytes"] == 0, row
        assert row["registers"] <= REGISTERS[row["kernel"]], row
        # Three logits a pixel, side by side, are no power of two: loads of 16 or 32 bits, still in one piece a warp.
        if not (row["regions"] == 3 and row["layout"] == "channels last"):
            assert row["widest load, bits"] == 128, row
