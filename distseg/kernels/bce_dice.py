"""The sums behind BCE + soft Dice, in plain torch: the definition that any faster kernel is held to.

For logits x, p = sigmoid(x), target t in {0, 1} (is the pixel's label in the region?), over the valid pixels (label
not 255), per region:

    P = sum p,   T = sum t,   I = sum p t,   B = sum log(1 + exp(t ? -x : x)),   N = number of pixels

    dP/dx = p (1 - p),   dI/dx = t p (1 - p),   dB/dx = p - t

Shapes: B batch, R regions, H rows, W columns.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F

from distseg.config import IGNORED_LABEL, MAX_LABEL

SUMS = ("probability", "truth", "overlap", "bce", "count")  # the order of region_sums' last axis


def region_bits(regions: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """One bit mask a region: bit l is set where label l belongs to it.

    Raises:
        ValueError: a label is above 62.
    """
    if any(label > MAX_LABEL for labels in regions.values() for label in labels):
        raise ValueError(f"regions: got {dict(regions)}; labels of regions are at most {MAX_LABEL}; renumber them")
    return tuple(sum(1 << label for label in set(labels)) for labels in regions.values())


def region_targets(label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """Which regions each pixel is in.

    Args:
        label_BHW: uint8 labels; 255 is in no region.
        bits: from `region_bits`.

    Returns:
        bool, (B, R, H, W).
    """
    none = torch.zeros_like(label_BHW, dtype=torch.bool)
    return torch.stack([reduce(or_, (label_BHW == label for label in labels_of(mask)), none) for mask in bits], dim=1)


def labels_of(mask: int) -> list[int]:
    """The labels of one of `region_bits`' masks, ascending."""
    return [label for label in range(MAX_LABEL + 1) if mask >> label & 1]


def region_sums(logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """The five sums over the pixels of each sample, differentiable in the logits; all zero where every pixel is ignored.

    A NaN at a valid pixel makes its region's sums NaN; what an ignored pixel holds reaches nothing.

    Args:
        logits_BRHW: float of any precision; the arithmetic is float32 (float64 for float64).
        label_BHW: uint8 labels; 255 is ignored.
        bits: from `region_bits`, one a region.

    Returns:
        (B, R, 5) in the order of `SUMS`, float32 (float64 for float64 logits).
    """
    valid_B1HW = (label_BHW != IGNORED_LABEL).unsqueeze(1)
    t = region_targets(label_BHW, bits)
    # At a logit of minus infinity outside the region all sums and gradients are zero.
    x = (logits_BRHW if logits_BRHW.dtype == torch.float64 else logits_BRHW.float()).where(valid_B1HW, -torch.inf)
    p = torch.sigmoid(x)
    bce = -F.logsigmoid(torch.where(t, x, -x))
    summands = (p, t, p * t, bce, valid_B1HW.expand_as(t))
    return torch.stack([each.sum((2, 3), dtype=x.dtype) for each in summands], dim=-1)
