"""Tensors that may be shards: copied whole, gathered, placed as a parameter is."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

OptimizerState = dict[str, dict[str, Tensor]]  # of each parameter, by its name: Adam's exp_avg, exp_avg_sq, step


def poisoned(loss: Tensor) -> Tensor:
    """The loss; one that is not finite gives every gradient NaN, so that looking at gradients is enough."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def copied(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU; the caller waits for the device before it is read."""
    contiguous = torch.contiguous_format
    return tensor.detach().to("cpu", copy=True, non_blocking=True, memory_format=contiguous)


def whole(tensor: Tensor) -> Tensor:
    """The tensor that a shard is of; every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard; a tensor that is no shard as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor placed, and sharded, as a parameter is; numbers stay where they are."""
    if value.ndim == 0:
        return value.clone()  # Adam's step, counted up in place: not to be shared by parameters
    moved = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return moved
