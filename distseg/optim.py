"""The optimizer and its learning rate, a function of the step alone (so that there is no scheduler state to lose)."""

import math

import torch
from torch import nn

from distseg.config import OptimConfig


def build_optimizer(optim: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Adam or AdamW over all parameters; weight decay spares biases and norms (one-dimensional parameters).

    Groups of the encoder have `is_encoder` set: their learning rate is another, see `set_learning_rate`.
    """
    groups = []
    for is_encoder in (False, True):
        own = [p for name, p in network.named_parameters() if name.startswith("encoder.") == is_encoder]
        groups.append({"params": [p for p in own if p.ndim > 1], "weight_decay": optim.weight_decay})
        groups.append({"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0})
        for group in groups[-2:]:
            group["is_encoder"] = is_encoder
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
    return kind([group for group in groups if group["params"]], lr=optim.lr)


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, lr: float, epoch: int) -> None:
    """Gives each group its rate; 0 freezes the encoder, whatever wraps the network (weight decay is scaled by it too)."""
    factor = 0.0 if epoch < optim.frozen_encoder_epochs else optim.encoder_lr_factor
    for group in optimizer.param_groups:
        group["lr"] = lr * factor if group["is_encoder"] else lr
