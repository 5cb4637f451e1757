"""What tests change inside a training process before it starts: `run_ranks(..., change=...)`."""

import os
import signal
import sys
import time
from typing import Any

import torch

from distseg.losses import BceDiceLoss
from distseg.training import loop
from distseg.training.data_parallel import DataParallel


def nan_logits(steps: set[int], rank: str) -> None:
    """A rank's own NaN at some of its calls; it is in the sums of the global batch, so all ranks must skip the step."""
    over_heads, calls = BceDiceLoss.over_heads, 0

    def sometimes_nan(self: BceDiceLoss, logits: torch.Tensor, label_BHW: torch.Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls in steps and os.environ.get("RANK", "0") == rank:
            logits = logits * torch.nan
        return over_heads(self, logits, label_BHW)

    BceDiceLoss.over_heads = sometimes_nan  # type: ignore[method-assign]


def hang(rank: str, step: int) -> None:
    """A rank that does not come to the end of a step."""
    take_step, calls = DataParallel.step, 0

    def hanging(self: DataParallel) -> Any:
        nonlocal calls
        calls += 1
        if calls == step and os.environ["RANK"] == rank:
            time.sleep(600)
        return take_step(self)

    DataParallel.step = hanging  # type: ignore[method-assign]


def kill_after_checkpoint() -> None:
    save = loop.Trainer._save

    def killed(self: loop.Trainer, *args: Any) -> None:
        save(self, *args)
        self.writer.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    loop.Trainer._save = killed  # type: ignore[method-assign]


def signal_in_validation() -> None:
    score = loop.Trainer._score_val

    def asked(self: loop.Trainer) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return score(self)

    loop.Trainer._score_val = asked  # type: ignore[method-assign]


def falling_scores() -> None:
    """Validations of which the first is the best."""

    def score(self: loop.Trainer) -> Any:
        return 1.0, {"lung": 1 / self.progress.step, "infection": 0.5}

    loop.Trainer._score_val = score  # type: ignore[method-assign]


def block(package: str) -> None:
    """A package that is not installed."""
    sys.modules[package] = None  # type: ignore[assignment]
