"""BCE + soft Dice on regions, of the global batch: N ranks x batch b gives the loss and gradient of one process x N*b."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from distseg.config import LossConfig
from distseg.kernels import region_sums, sum_over_ranks


class LossTerms(NamedTuple):
    loss: torch.Tensor  # scalar, to call backward on
    bce: torch.Tensor  # scalar
    dice_R: torch.Tensor  # soft Dice a region


class BceDiceLoss(nn.Module):
    """w_bce * mean BCE + w_dice * (1 - mean over regions of batch Dice).

    Dice_r = (2 I_r + s) / (P_r + T_r + s) over all pixels of the global batch, so a region absent from it still has a
    gradient: Dice = s / (P + s) falls with every false positive. A batch whose pixels are all ignored has loss 0.
    Source: Milletari et al. 2016 (V-Net), first powers in the denominator as Drozdzal et al. 2016.

    Args:
        bits: one bit mask over labels a region, from `distseg.kernels.region_bits`.
        bce_weight, dice_weight: weights of the two terms.
        smooth: s, in pixels, above 0.
    """

    def __init__(self, bits: tuple[int, ...], bce_weight: float = 1.0, dice_weight: float = 1.0, smooth: float = 1.0):
        super().__init__()
        self.bits = bits
        self.bce_weight = bce_weight
        self.dice_weight = dice_weight
        self.smooth = smooth

    def forward(self, logits_BRHW: torch.Tensor, label_BHW: torch.Tensor) -> LossTerms:
        """Every rank must call it; all get the same value.

        Args:
            logits_BRHW: float of any precision.
            label_BHW: uint8 labels; 255 is ignored.
        """
        return self.from_sums(sum_over_ranks(region_sums(logits_BRHW, label_BHW, self.bits)))

    def over_heads(self, logits: torch.Tensor | Sequence[torch.Tensor], label_BHW: torch.Tensor) -> LossTerms:
        """The mean loss of several heads, with BCE and Dice of the last; of one head, its own terms."""
        if isinstance(logits, torch.Tensor):
            return self(logits, label_BHW)
        terms = [self(logits_BRHW, label_BHW) for logits_BRHW in logits]
        return LossTerms(torch.stack([each.loss for each in terms]).mean(), terms[-1].bce, terms[-1].dice_R)

    def from_sums(self, sums_R5: torch.Tensor) -> LossTerms:
        """The terms of sums that cover any number of batches and ranks, in the order of `region_sums`."""
        probability_R, truth_R, overlap_R, bce_R, count_R = sums_R5.unbind(dim=1)
        bce = (bce_R / count_R.clamp(min=1)).mean()
        dice_R = (2 * overlap_R + self.smooth) / (probability_R + truth_R + self.smooth)
        loss = self.bce_weight * bce + self.dice_weight * (1 - dice_R.mean())
        return LossTerms(loss, bce, dice_R)


def build_loss(loss: LossConfig, bits: tuple[int, ...]) -> BceDiceLoss:
    """The loss of the configuration's `loss` section."""
    return BceDiceLoss(bits, loss.bce_weight, loss.dice_weight, loss.smooth)
