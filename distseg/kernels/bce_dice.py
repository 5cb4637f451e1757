"""The sums behind BCE + soft Dice, in plain torch: the definition that any faster kernel is held to.

For logits x, p = sigmoid(x), target t in {0, 1} (is the pixel's label in the region?), over the valid pixels (label
not 255), per region:

    P = sum p,   T = sum t,   I = sum p t,   B = sum [max(x, 0) - x t + log(1 + exp(-|x|))],   N = number of pixels

    dP/dx = p (1 - p),   dI/dx = t p (1 - p),   dB/dx = p - t

Shapes: B batch, R regions, H rows, W columns.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from distseg.config import IGNORED_LABEL

SUMS = ("probability", "truth", "overlap", "bce", "count")  # the order of region_sums' last axis
MAX_LABEL = 62  # a region is an int64 bit mask over labels


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
    # Shifting by 63 or more is undefined, so ignored pixels are looked up as background: bit 0 is never set.
    shift_B1HW = label_BHW.where(label_BHW <= MAX_LABEL, 0).long().unsqueeze(1)
    bits_R = torch.tensor(bits, dtype=torch.int64, device=label_BHW.device)
    return ((bits_R.view(1, -1, 1, 1) >> shift_B1HW) & 1).bool()


def region_sums(logits_BRHW: torch.Tensor, label_BHW: torch.Tensor, bits: Sequence[int]) -> torch.Tensor:
    """The five sums over batch and pixels, differentiable in the logits; all zero where every pixel is ignored.

    Args:
        logits_BRHW: float of any precision; the arithmetic is float32 (float64 for float64).
        label_BHW: uint8 labels; 255 is ignored.
        bits: from `region_bits`, one a region.

    Returns:
        (R, 5) in the order of `SUMS`, float32 (float64 for float64 logits).
    """
    x = logits_BRHW if logits_BRHW.dtype == torch.float64 else logits_BRHW.float()
    valid = (label_BHW != IGNORED_LABEL).unsqueeze(1).to(x.dtype)
    t = region_targets(label_BHW, bits).to(x.dtype)
    p = torch.sigmoid(x) * valid
    bce = F.binary_cross_entropy_with_logits(x, t, reduction="none") * valid
    over_pixels = (0, 2, 3)
    count_R = valid.sum().expand(len(bits))
    return torch.stack(
        [p.sum(over_pixels), t.sum(over_pixels), (p * t).sum(over_pixels), bce.sum(over_pixels), count_R], dim=1
    )
