"""`distseg train` with a loss that is NaN at the steps of BAD_STEPS, on the rank of BAD_RANK alone where that is said.

A rank's own NaN comes in by its logits; it is in the sums of the global batch, so all ranks must skip the step.
"""

import os
from typing import Any

import torch

from distseg.losses import BceDiceLoss
from distseg.train import main

BAD_STEPS = {int(step) for step in os.environ["BAD_STEPS"].split(",")}
calls = 0
over_heads = BceDiceLoss.over_heads


def sometimes_nan(self: BceDiceLoss, logits: torch.Tensor, label_BHW: torch.Tensor) -> Any:
    global calls
    calls += 1
    if calls in BAD_STEPS and os.environ.get("RANK", "0") == os.environ.get("BAD_RANK", "0"):
        logits = logits * torch.nan
    return over_heads(self, logits, label_BHW)


if __name__ == "__main__":
    BceDiceLoss.over_heads = sometimes_nan  # type: ignore[method-assign]
    raise SystemExit(main())
