"""Scores of one region from its confusion counts, means with a patient bootstrap, and the policy for empty masks.

Counts are (tp, fp, fn, tn), pixels or voxels. A score whose denominator is 0 is undefined: NaN here, null in JSON.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

EmptyPolicy = Literal["exclude", "one", "zero"]


def confusion_counts(
    predicted_BRHW: "torch.Tensor", truth_BRHW: "torch.Tensor", valid_BHW: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Confusion counts over batch and pixels.

    Args:
        predicted_BRHW, truth_BRHW: bool.
        valid_BHW: bool; pixels that are False count nowhere. None: all count.

    Returns:
        int64 (R, 4): tp, fp, fn, tn.
    """
    import torch  # here: who reads scores from tables need not wait for it

    valid = torch.ones_like(predicted_BRHW[:, :1]) if valid_BHW is None else valid_BHW.unsqueeze(1)
    over_pixels = (0, 2, 3)
    tp = (predicted_BRHW & truth_BRHW & valid).sum(over_pixels)
    fp = (predicted_BRHW & ~truth_BRHW & valid).sum(over_pixels)
    fn = (~predicted_BRHW & truth_BRHW & valid).sum(over_pixels)
    tn = (~predicted_BRHW & ~truth_BRHW & valid).sum(over_pixels)
    return torch.stack([tp, fp, fn, tn], dim=1)


def scores_from_counts(counts: Sequence[int], empty: EmptyPolicy = "exclude") -> dict[str, float]:
    """Dice, IoU, precision (PPV), sensitivity (recall) and specificity TN/(TN+FP).

    Where truth and prediction are both empty, Dice, IoU, precision and sensitivity are undefined; `empty` makes them NaN
    (exclude), 1 or 0. Where only one of the two is empty, Dice and IoU are 0 by their formula; the undefined one of
    precision (nothing predicted) and sensitivity (nothing there) stays NaN.
    """
    tp, fp, fn, tn = (int(count) for count in counts)
    scores = {
        "dice": _ratio(2 * tp, 2 * tp + fp + fn),
        "iou": _ratio(tp, tp + fp + fn),
        "precision": _ratio(tp, tp + fp),
        "sensitivity": _ratio(tp, tp + fn),
        "specificity": _ratio(tn, tn + fp),
    }
    if tp + fp + fn == 0 and empty != "exclude":
        value = {"one": 1.0, "zero": 0.0}[empty]
        scores |= dict.fromkeys(("dice", "iou", "precision", "sensitivity"), value)
    return scores


def mean_defined(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def none_if_undefined(value: float) -> float | None:
    """NaN and infinity as None: JSON knows neither."""
    return value if math.isfinite(value) else None


def patient_bootstrap_ci(
    value_of_case: Sequence[float], patient_of_case: Sequence[str], resamples: int, seed: int = 0
) -> tuple[float, float]:
    """95% percentile interval of the mean over cases, resampling whole patients with replacement.

    NaN cases are left out of each mean. (NaN, NaN) for fewer than two patients with a defined value: one patient says
    nothing about the next.
    """
    values_of: dict[str, list[float]] = {}
    for value, patient in zip(value_of_case, patient_of_case, strict=True):
        if not math.isnan(value):
            values_of.setdefault(patient, []).append(value)
    if len(values_of) < 2:
        return math.nan, math.nan
    of_patients = [values_of[patient] for patient in sorted(values_of)]
    sums, counts = [sum(values) for values in of_patients], [len(values) for values in of_patients]
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = np.asarray(sums)[drawn].sum(axis=1) / np.asarray(counts)[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
