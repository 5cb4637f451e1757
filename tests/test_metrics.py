"""Scores against values worked out by hand, and their undefined cases."""

import math

import pytest
import torch

from distseg.metrics import confusion_counts, mean_defined, patient_bootstrap_ci, scores_from_counts


def test_scores_of_hand_counted_pixels() -> None:
    truth = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool).view(1, 1, 2, 4)
    predicted = torch.tensor([[1, 1, 0, 1, 0, 0, 0, 0]], dtype=torch.bool).view(1, 1, 2, 4)
    counts = confusion_counts(predicted, truth)
    assert counts.tolist() == [[2, 1, 1, 4]]
    scores = scores_from_counts(counts[0].tolist())
    assert scores == pytest.approx(
        {"dice": 4 / 6, "iou": 2 / 4, "precision": 2 / 3, "sensitivity": 2 / 3, "specificity": 4 / 5}
    )


def test_pixels_that_are_not_valid_count_nowhere() -> None:
    truth = torch.ones(2, 1, 1, 3, dtype=torch.bool)
    valid = torch.tensor([[[True, True, False]], [[False, False, False]]])
    assert confusion_counts(~truth, truth, valid).tolist() == [[0, 0, 2, 0]]


@pytest.mark.parametrize(("policy", "value"), [("exclude", math.nan), ("one", 1.0), ("zero", 0.0)])
def test_empty_truth_and_prediction_score_as_the_policy_says(policy: str, value: float) -> None:
    scores = scores_from_counts((0, 0, 0, 9), policy)  # type: ignore[arg-type]
    assert scores["dice"] == pytest.approx(value, nan_ok=True) and scores["specificity"] == 1


@pytest.mark.parametrize("policy", ["exclude", "one", "zero"])
def test_a_false_alarm_or_a_miss_scores_zero_under_every_policy(policy: str) -> None:
    assert scores_from_counts((0, 3, 0, 6), policy)["dice"] == 0  # type: ignore[arg-type]
    assert scores_from_counts((0, 0, 3, 6), policy)["iou"] == 0  # type: ignore[arg-type]


def test_the_mean_leaves_out_what_is_undefined() -> None:
    assert mean_defined([1.0, math.nan, 0.0]) == 0.5 and math.isnan(mean_defined([math.nan]))


def test_the_interval_resamples_patients_and_not_volumes() -> None:
    values, patients = [0.0] * 50 + [1.0], ["a"] * 50 + ["b"]
    low, high = patient_bootstrap_ci(values, patients, resamples=2000)
    assert low == 0 and high == 1  # one of four resamples holds only b
    assert all(math.isnan(bound) for bound in patient_bootstrap_ci([0.5, 0.6], ["a", "a"], 100))
    assert patient_bootstrap_ci([0.5, 0.5, math.nan], ["a", "b", "c"], 100) == (0.5, 0.5)
