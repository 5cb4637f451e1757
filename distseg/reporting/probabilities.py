"""What a histogram of predicted probabilities says: calibration, and the scores of every threshold.

Bin k of K holds the voxels of probability k/K to (k+1)/K, counted in the region (positive) and outside it (negative).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distseg.metrics import scores_from_counts

GROUPS = 20  # of bins, that a calibration curve has points for
NEAR_ZERO = 0.01  # of which most voxels of a volume are: they hide all others in a mean


@dataclass(frozen=True)
class Calibration:
    points: list[tuple[float, float]]
    """mean probability, share of voxels in the region; of each group of bins that has any"""
    error: float
    """expected calibration error over all voxels; NaN for none"""
    error_above: float
    """over the voxels of probability NEAR_ZERO or more; NaN for none"""


@dataclass(frozen=True)
class ThresholdScores:
    """Pooled over voxels; undefined is NaN."""

    threshold: float
    dice: float
    precision: float
    sensitivity: float


def calibration(positive: Sequence[int], negative: Sequence[int]) -> Calibration:
    """How often voxels of a probability are in the region.

    The error is the mean over voxels of how far a bin's share of the region lies from the bin's probabilities: 0 within the
    bin, of which nothing more is known, so it is at most 1/K below the textbook's, which takes each bin's mean probability.
    """
    inside, outside = np.asarray(positive, float), np.asarray(negative, float)
    voxels, n_bins = inside + outside, len(inside)
    low = np.arange(n_bins) / n_bins
    share = np.divide(inside, voxels, out=np.zeros(n_bins), where=voxels > 0)
    gap = np.maximum(np.maximum(low - share, share - low - 1 / n_bins), 0)
    above = low >= NEAR_ZERO - 1e-9
    each = max(1, n_bins // GROUPS)
    points = []
    for first in range(0, n_bins, each):
        group = slice(first, first + each)
        if voxels[group].sum() > 0:
            middle = float(np.average(low[group] + 0.5 / n_bins, weights=voxels[group]))
            points.append((middle, float(inside[group].sum() / voxels[group].sum())))
    return Calibration(points, _mean(gap, voxels), _mean(gap[above], voxels[above]))


def threshold_scores(positive: Sequence[int], negative: Sequence[int]) -> list[ThresholdScores]:
    """Dice, precision and sensitivity at every edge of a bin but 0: a voxel is in the mask from the threshold on."""
    inside, outside, n_bins = np.asarray(positive), np.asarray(negative), len(positive)
    scores = []
    for k in range(1, n_bins):
        tp, fp, fn = int(inside[k:].sum()), int(outside[k:].sum()), int(inside[:k].sum())
        found = scores_from_counts((tp, fp, fn, 0))
        scores.append(ThresholdScores(k / n_bins, found["dice"], found["precision"], found["sensitivity"]))
    return scores


def best_threshold(scores: Sequence[ThresholdScores]) -> ThresholdScores | None:
    """The first of the highest Dice; None where it is undefined at all of them."""
    defined = [one for one in scores if not math.isnan(one.dice)]
    return max(defined, key=lambda one: one.dice) if defined else None


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(np.average(values, weights=weights)) if weights.sum() > 0 else math.nan
