"""The optimizer and its learning rate, a function of the step alone (so that there is no scheduler state to lose)."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import nn

from distseg.config import OptimConfig

POLY_POWER = 0.9  # of DeepLab (Chen et al. 2017) and nnU-Net


def build_optimizer(optim: OptimConfig, network: nn.Module) -> torch.optim.Optimizer:
    """Adam, AdamW or SGD over all parameters; weight decay spares biases and norms (one-dimensional parameters).

    Groups have `lr_factor`, their rate as a multiple of optim.lr, and `is_encoder`; see `set_learning_rate`.

    Raises:
        DistsegError: layer_decay for an encoder that is not a row of levels.
    """
    encoder: Any = network.get_submodule("encoder")
    level_of = encoder.level_of_parameters() if optim.layer_decay < 1 else {}
    deepest = max(level_of.values(), default=0)
    members: dict[tuple[bool, int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        is_encoder = name.startswith("encoder.")
        level = level_of.get(name.removeprefix("encoder."), deepest)
        members[is_encoder, level, parameter.ndim > 1].append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "is_encoder": is_encoder,
            "lr_factor": (optim.encoder_lr_factor if is_encoder else 1.0) * optim.layer_decay ** (deepest - level),
        }
        for (is_encoder, level, decays), parameters in members.items()
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optim.name]
    return kind(groups, lr=optim.lr)


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    if optim.schedule == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr * (1 - progress) ** POLY_POWER if optim.schedule == "poly" else optim.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, optim: OptimConfig, lr: float, epoch: int) -> None:
    """Gives each group its rate; 0 freezes the encoder, whatever wraps the network (weight decay is scaled by it too)."""
    for group in optimizer.param_groups:
        frozen = group["is_encoder"] and epoch < optim.frozen_encoder_epochs
        group["lr"] = 0.0 if frozen else lr * group["lr_factor"]
