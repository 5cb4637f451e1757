"""BCE + soft Dice on regions, of the global batch: N ranks x batch b gives the loss and gradient of one process x N*b."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from distseg.config import LossConfig
from distseg.kernels import region_sums, sum_over_ranks
from distseg.kernels.bce_dice import SUMS


class LossTerms(NamedTuple):
    loss: torch.Tensor  # scalar, to call backward on
    bce: torch.Tensor  # scalar
    dice_R: torch.Tensor  # soft Dice a region over all pixels, whatever the loss makes of it


class BceDiceLoss(nn.Module):
    """bce_weight * BCE + dice_weight * mean over regions of (1 - Dice), both from five sums a region.

        BCE_r = B_r / N_r,   Dice_r = (2 I_r + s) / (P_r + T_r + s)

    over all pixels of the global batch, or over each of its samples and then their mean (`dice_over`). Ignored pixels
    are in no sum, samples and batches without another pixel in no mean; a batch of nothing else has loss 0.

    Tversky: with FP = P - I and FN = T - I, Dice_r = (2 I + s) / (2 I + 2 a FP + 2 b FN + s), Dice itself at a = b = 0.5.
    Focal: (1 - Dice_r)^g. Focal BCE is not offered: it is not a function of these sums.

    A region that is absent (T = 0) has Dice s / (P + s), which falls with every false positive (`penalise`), or is left
    to BCE, which does too (`skip`).

    With gradient accumulation each micro-batch is a global batch of its own and the step's loss is their mean, on any
    number of ranks.

    Source: Milletari et al. 2016 (V-Net), first powers in the denominator as Drozdzal et al. 2016; Salehi et al. 2017
    (Tversky); Abraham and Khan 2019 (focal Tversky).

    Args:
        bits: one bit mask over labels a region, from `distseg.kernels.region_bits`.
        config: weights, smooth term and variants.
        region_weights: weight of each region in BCE and Dice, only their ratios matter; None: equal.
    """

    weight_R: torch.Tensor

    def __init__(
        self, bits: tuple[int, ...], config: LossConfig | None = None, region_weights: Sequence[float] | None = None
    ):
        super().__init__()
        self.bits = bits
        self.config = config or LossConfig()
        self.register_buffer("weight_R", torch.tensor(region_weights or [1.0] * len(bits)), persistent=False)

    def forward(self, logits_BRHW: torch.Tensor, label_BHW: torch.Tensor) -> LossTerms:
        """Every rank must call it; all get the same value.

        Args:
            logits_BRHW: float of any precision.
            label_BHW: uint8 labels; 255 is ignored.
        """
        return self.terms(sum_over_ranks(self.totals(logits_BRHW, label_BHW)))

    def over_heads(self, logits: torch.Tensor | Sequence[torch.Tensor], label_BHW: torch.Tensor) -> LossTerms:
        """The mean loss of several heads, with BCE and Dice of the last; of one head, its own terms."""
        heads = [logits] if isinstance(logits, torch.Tensor) else logits
        totals = sum_over_ranks(torch.stack([self.totals(logits_BRHW, label_BHW) for logits_BRHW in heads]))
        terms = [self.terms(each) for each in totals]
        return LossTerms(torch.stack([each.loss for each in terms]).mean(), terms[-1].bce, terms[-1].dice_R)

    def totals(self, logits_BRHW: torch.Tensor, label_BHW: torch.Tensor) -> torch.Tensor:
        """What `terms` needs, (R, 5) or (R, 7): sums, so that batches and ranks are added up."""
        sums_BR5 = region_sums(logits_BRHW, label_BHW, self.bits, self.config.kernel)
        if self.config.dice_over == "batch":
            return sums_BR5.sum(dim=0)
        counted_BR = self._counted(sums_BR5)
        shortfall_BR = self._shortfall(sums_BR5) * counted_BR
        return torch.cat([sums_BR5, shortfall_BR.unsqueeze(-1), counted_BR.unsqueeze(-1)], dim=-1).sum(dim=0)

    def terms(self, totals: torch.Tensor) -> LossTerms:
        """The terms of `totals` that cover any number of batches and ranks."""
        probability_R, truth_R, overlap_R, bce_R, count_R = totals[:, : len(SUMS)].unbind(dim=1)
        if self.config.dice_over == "batch":
            counted_R = self._counted(totals)
            shortfall_R = self._shortfall(totals)
        else:
            counted_R = (totals[:, -1] > 0).to(totals.dtype)
            shortfall_R = totals[:, -2] / totals[:, -1].clamp(min=1)
        weight_R = self.weight_R.to(totals.dtype)
        bce = (weight_R * bce_R / count_R.clamp(min=1)).sum() / weight_R.sum()
        in_dice_R = weight_R * counted_R
        shortfall = (in_dice_R * shortfall_R).sum() / in_dice_R.sum().clamp(min=torch.finfo(totals.dtype).tiny)
        smooth = self.config.smooth
        dice_R = (2 * overlap_R + smooth) / (probability_R + truth_R + smooth)
        return LossTerms(self.config.bce_weight * bce + self.config.dice_weight * shortfall, bce, dice_R)

    def _shortfall(self, sums: torch.Tensor) -> torch.Tensor:
        """(1 - Dice)^focal of (..., R, 5), its Tversky form where the config weighs errors unequally."""
        config = self.config
        probability, truth, overlap = sums[..., 0], sums[..., 1], sums[..., 2]
        false_positive, false_negative = probability - overlap, truth - overlap
        errors = 2 * (config.false_positive_weight * false_positive + config.false_negative_weight * false_negative)
        # errors / (2 I + errors + s) is 1 - Dice without a difference of numbers near 1.
        shortfall = errors / (2 * overlap + errors + config.smooth)
        if config.focal_exponent == 1:
            return shortfall
        # Below 1 the slope of a power is infinite at 0.
        return shortfall.clamp(min=torch.finfo(sums.dtype).eps) ** config.focal_exponent

    def _counted(self, sums: torch.Tensor) -> torch.Tensor:
        """1 for each region of (..., R, 5) that Dice is taken of, else 0."""
        truth, count = sums[..., 1], sums[..., 4]
        return ((truth if self.config.absent_regions == "skip" else count) > 0).to(sums.dtype)


def build_loss(config: LossConfig, regions: Sequence[str], bits: tuple[int, ...]) -> BceDiceLoss:
    """The loss of the configuration's `loss` section for regions of those names."""
    return BceDiceLoss(bits, config, [config.region_weights.get(name, 1.0) for name in regions])
