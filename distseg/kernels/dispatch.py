"""The one door to the region sums: it chooses the kernel, and is what autograd and torch.compile see.

The fused kernels are a `torch.library` operator with a fake and a gradient, so that torch.compile neither breaks its
graph there nor looks inside.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch

from distseg.kernels import bce_dice, cpu_bce_dice
from distseg.kernels.bce_dice import SUMS

Wanted = Literal["auto", "definition", "fused"]
HAS_TRITON = find_spec("triton") is not None  # looked for once: a loss is computed every step
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernel_for(device: torch.device, dtype: torch.dtype = torch.float32, wanted: Wanted = "auto") -> str:
    """What computes the sums of logits there: `triton`, `cpu` (blocks that stay in cache) or `definition`.

    Raises:
        ValueError: `fused` is wanted and there is no such kernel.
    """
    fused = {"cpu": "cpu", "cuda": "triton" if HAS_TRITON else None}.get(device.type)
    if wanted == "definition" or (wanted == "auto" and (fused is None or dtype not in FUSED_DTYPES)):
        return "definition"
    if fused is None or dtype not in FUSED_DTYPES:
        raise ValueError(
            f"kernel: got fused for {dtype} on {device.type}; it needs float32, bfloat16 or float16 logits on a CPU or, "
            "with Triton, on CUDA; use auto"
        )
    return fused


def region_sums(
    logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int], wanted: Wanted = "auto"
) -> torch.Tensor:
    """The five sums over the pixels of each sample, differentiable once in the logits.

    A NaN at a valid pixel makes its region's sums NaN; what an ignored pixel holds reaches nothing. The same input gives
    the same bits on any number of CPU threads and in every run.

    Args:
        logits_BRHW: float, contiguous or channels last (another layout is copied); the arithmetic is float32 (float64
            for float64).
        label_BHW: uint8 labels; 255 is ignored.
        bits: from `region_bits`, one a region.
        wanted: `auto`, or a test's or a doubter's choice of kernel.

    Returns:
        (B, R, 5) in the order of `SUMS`, float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the kernel that is wanted is not there.
    """
    shape = tuple(logits_BRHW.shape)
    if len(shape) != 4 or shape[1] != len(bits) or tuple(label_BHW.shape) != (shape[0], *shape[2:]):
        raise ValueError(
            f"region sums: got logits {shape} and labels {tuple(label_BHW.shape)} for {len(bits)} regions; they must be "
            "(B, R, H, W) and (B, H, W)"
        )
    if label_BHW.dtype != torch.uint8 or not logits_BRHW.is_floating_point() or label_BHW.device != logits_BRHW.device:
        raise ValueError(
            f"region sums: got {logits_BRHW.dtype} logits on {logits_BRHW.device} and {label_BHW.dtype} labels on "
            f"{label_BHW.device}; logits must be float, labels uint8 on the same device"
        )
    if kernel_for(logits_BRHW.device, logits_BRHW.dtype, wanted) == "definition":
        return bce_dice.region_sums(logits_BRHW, label_BHW, bits)
    is_dense = logits_BRHW.is_contiguous() or logits_BRHW.is_contiguous(memory_format=torch.channels_last)
    logits_BRHW = logits_BRHW if is_dense else logits_BRHW.contiguous()
    return _fused_sums(logits_BRHW, label_BHW.contiguous(), list(bits))


def _kernels(logits_BRHW: torch.Tensor) -> Any:
    if logits_BRHW.is_cuda:
        from distseg.kernels import triton_bce_dice  # only where there is a GPU: Triton takes a second to import

        return triton_bce_dice
    return cpu_bce_dice


@torch.library.custom_op("distseg::region_sums", mutates_args=(), device_types=("cpu", "cuda"))
def _fused_sums(logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    return _kernels(logits_BRHW).forward(logits_BRHW, label_BHW, bits)


@torch.library.custom_op("distseg::region_sums_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def _fused_gradient(
    logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int], grad_BR5: torch.Tensor
) -> torch.Tensor:
    return _kernels(logits_BRHW).backward(logits_BRHW, label_BHW, bits, grad_BR5)


@_fused_sums.register_fake
def _fake_sums(logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    return logits_BRHW.new_empty(*logits_BRHW.shape[:2], len(SUMS), dtype=torch.float32)


@_fused_gradient.register_fake
def _fake_gradient(
    logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int], grad_BR5: torch.Tensor
) -> torch.Tensor:
    return torch.empty_like(logits_BRHW)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, Sequence[int]], output: torch.Tensor) -> None:
    logits_BRHW, label_BHW, ctx.bits = inputs
    ctx.save_for_backward(logits_BRHW, label_BHW)


def _gradient(ctx: Any, grad_BR5: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return _fused_gradient(*ctx.saved_tensors, ctx.bits, grad_BR5.contiguous()), None, None


_fused_sums.register_autograd(_gradient, setup_context=_keep)
