"""Every benchmark runs at toy size and ends as it should; how fast anything is decides nothing here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow(25)
@pytest.mark.parametrize(
    "words",
    [
        "input_pipeline",
        "store_scale",
        "models",
        "recipes widths",
        "loss",
        "loop_overhead",
        "scaling",
        "serving",
        "exclusive",
        "plan --seeds 0 --folds 0",
    ],
)
def test_a_quick_benchmark_ends_with_its_verdict(words: str, run_command: Callable) -> None:
    name, *rest = words.split()
    done = run_command(sys.executable, FOLDER / f"{name}.py", *rest, "--quick")
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert list(verdict) == ["benchmark", "ratios", "targets", "met"] and verdict["benchmark"] == name
    assert all(isinstance(ratio, float) for ratio in verdict["ratios"].values())
    assert verdict["targets"].keys() and isinstance(verdict["met"], bool)
