"""Sums over ranks that gradients flow through."""

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of connected ranks; 1 where no process group was set up."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _SumOverRanks(torch.autograd.Function):
    """y = sum over ranks of x_r.

    Every rank computes the same loss L(y), and the wrapper (DDP, ZeRO) averages parameter gradients over the W ranks:
    (1/W) sum_r dL/dy dx_r/dw. The gradient of the global loss is sum_r dL/dy dx_r/dw, hence the factor W below. Without
    it the loss of step 1 is right and everything after it is wrong.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * dist.get_world_size()


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Sum of `x` over all ranks, its gradient made for wrappers that average over ranks; `x` itself for one rank.

    Every rank must call it, with the same shape and dtype.
    """
    return _SumOverRanks.apply(x) if world_size() > 1 else x
