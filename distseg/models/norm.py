"""Batch norm over the images of all ranks, also on CPU, where torch's SyncBatchNorm raises.

For one channel, with the sums over the N pixels of all images of all ranks:

    m = sum(x) / N,  v = sum((x - m)^2) / N,  y = (x - m) / sqrt(v + eps),  result = weight * y + bias
    dL/dx = (g - sum(g) / N - y * sum(g * y) / N) / sqrt(v + eps),  where g = dL/dy and L = the sum of the ranks' losses

The gradients of weight and bias stay each rank's own: data parallel training reduces those itself.

Shape letters: B images of this rank, C channels, H height, W width.
"""

from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distseg.errors import DistsegError
from distseg.kernels.collectives import world_size


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm whose statistics in training are those of all ranks; plain batch norm on one rank and in eval.

    Every rank has at least one image. Statistics are in fp32 (fp64 for fp64 images).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, H, W), keeping shape and dtype.

        Raises:
            ValueError: In training with one value a channel on all ranks together.
        """
        result = self._synchronised(input) if self.training and world_size() > 1 else super().forward(input)
        for step in self.children():  # drop and act of timm's BatchNormAct2d; torch's has none
            result = step(result)
        return result

    def _synchronised(self, x_BCHW: Tensor) -> Tensor:
        wide = torch.promote_types(x_BCHW.dtype, torch.float32)
        y_BCHW, mean_C, variance_C, count = _GlobalNormalise.apply(x_BCHW.to(wide), self.eps)
        if self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None:
            self.num_batches_tracked.add_(1)
            share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
            self.running_var.lerp_((variance_C * count / (count - 1)).to(self.running_var.dtype), share)
        if self.affine:
            y_BCHW = y_BCHW * self.weight[:, None, None] + self.bias[:, None, None]
        return y_BCHW.to(x_BCHW.dtype)


class _GlobalNormalise(torch.autograd.Function):
    """x -> (y, mean, variance, count); see the top of the file."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean_C, variance_C, count = _global_statistics(x_BCHW)
        scale_C11 = torch.rsqrt(variance_C + eps)[:, None, None]
        y_BCHW = (x_BCHW - mean_C[:, None, None]) * scale_C11
        ctx.save_for_backward(y_BCHW, scale_C11, count)
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return y_BCHW, mean_C, variance_C, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BCHW: Tensor, *_: None) -> tuple[Tensor, None]:
        y_BCHW, scale_C11, count = ctx.saved_tensors
        sums_2C = torch.stack([g_BCHW.sum(dim=(0, 2, 3)), (g_BCHW * y_BCHW).sum(dim=(0, 2, 3))])
        dist.all_reduce(sums_2C)
        mean_g_C, mean_gy_C = sums_2C / count
        return (g_BCHW - mean_g_C[:, None, None] - y_BCHW * mean_gy_C[:, None, None]) * scale_C11, None


def _global_statistics(x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () over all ranks, the same bits on each.

    Merged from each rank's (Chan et al. 1979, equation 2.1): a sum of squares would cancel where the mean is large.
    """
    variance_C, mean_C = torch.var_mean(x_BCHW, dim=(0, 2, 3), correction=0)
    own = torch.stack([mean_C, variance_C, torch.full_like(mean_C, x_BCHW.numel() // mean_C.numel())])
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    mean_RC, variance_RC, count_RC = torch.stack(gathered, dim=1)
    count_C = count_RC.sum(dim=0)
    share_RC = count_RC / count_C
    mean_C = (share_RC * mean_RC).sum(dim=0)
    variance_C = (share_RC * (variance_RC + (mean_RC - mean_C) ** 2)).sum(dim=0)
    if count_C[0] < 2:
        raise ValueError(f"batch norm in training: got one value a channel, {tuple(x_BCHW.shape)}; needs at least two")
    return mean_C, variance_C, count_C[0]


def synchronise_batch_norm(model: nn.Module, device_type: str) -> nn.Module:
    """Makes every batch norm of `model` one over all ranks; parameters, buffers and their names stay.

    Args:
        model: Changed in place.
        device_type: `cuda`: torch's SyncBatchNorm, through timm; `cpu`: ours.

    Raises:
        DistsegError: For another device type.
    """
    if device_type == "cuda":
        return convert_sync_batchnorm(model)
    if device_type != "cpu":
        raise DistsegError(f"device: got {device_type!r}; batch norm is synchronised on cpu or cuda; use one of them")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm2d  # same attributes and children, only forward differs
    return model
