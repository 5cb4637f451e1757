"""Scores of volumes, patients, slices and pooled, by hand."""

import dataclasses
import math

import numpy as np
import pytest

from distseg.config import Config
from distseg.config_files import load_config
from distseg.data.store import Case
from distseg.scoring.cases import (
    BINS,
    pooled_dice,
    probabilities,
    rows_of_cases,
    rows_of_patients,
    rows_of_slices,
    score_case,
    summarise,
)
from distseg.scoring.segmenting import SegmentedCase

REGIONS = {"lung": (1, 2), "infection": (2,)}
SAID = "regions={lung: [1, 2], infection: [2]}"
CONFIG = load_config(None, ["evaluate.bootstrap_resamples=50", SAID])


def segmented(
    name: str,
    patient: str,
    truth: np.ndarray,
    mask: np.ndarray,
    spacing_mm: tuple[float, float, float] | None = (10.0, 1.0, 2.0),
) -> SegmentedCase:
    case = Case(name, patient, name, {}, name, truth.shape, spacing_mm, "hu", (0, 0), {}, {})
    return SegmentedCase(case, np.arange(len(truth)), truth.astype(np.int16), truth, mask)


@pytest.fixture
def two_cases() -> list[SegmentedCase]:
    """Patient a: infection tp 2, fp 1, fn 1 in slice 0, nothing in slice 1. Patient b: a false alarm of 3 voxels."""
    truth, mask = np.zeros((2, 2, 4, 4), np.uint8)
    truth[0, 0, :3], mask[0, 0, 1:] = 2, 2
    alarm = np.zeros((2, 4, 4), np.uint8)
    alarm[1, 2, :3] = 2
    return [segmented("a1", "a", truth, mask), segmented("b1", "b", np.zeros_like(alarm), alarm)]


def test_each_level_is_the_mean_of_what_it_says(two_cases: list[SegmentedCase]) -> None:
    found = summarise(CONFIG, [score_case(case, REGIONS) for case in two_cases])["regions"]["infection"]
    a, b = 2 * 2 / (2 * 2 + 1 + 1), 0.0
    assert found["dice"]["mean"] == pytest.approx((a + b) / 2) and found["dice"]["n"] == 2
    assert found["per_patient"]["dice"]["mean"] == pytest.approx((a + b) / 2)
    assert found["per_slice"]["dice"] == {
        "mean": pytest.approx((a + b) / 2),
        "ci95": found["per_slice"]["dice"]["ci95"],
        "n": 2,
    }
    assert found["pooled"]["dice"] == pytest.approx(2 * 2 / (2 * 2 + 4 + 1))
    assert (found["n_empty_truth"], found["n_empty_prediction"]) == (1, 0)
    assert found["sensitivity"]["n"] == 1  # b has nothing to find
    assert pooled_dice(two_cases, REGIONS)["infection"] == found["pooled"]["dice"]


def test_two_volumes_of_a_patient_are_one_patient(two_cases: list[SegmentedCase]) -> None:
    first, second = two_cases
    same = dataclasses.replace(second, case=dataclasses.replace(second.case, patient="a"))
    rows = rows_of_patients(CONFIG, [score_case(case, REGIONS) for case in (first, same)])
    assert [(row["patient"], row["infection_tp"], row["infection_fp"]) for row in rows] == [("a", 2, 4)]
    assert float(rows[0]["infection_dice"]) == pytest.approx(4 / 9, abs=1e-6)


def test_volumes_are_in_millilitres_and_their_error_is_predicted_minus_true(two_cases: list[SegmentedCase]) -> None:
    row = rows_of_cases(CONFIG, [score_case(two_cases[1], REGIONS)])[0]
    voxel_ml = 10 * 1 * 2 / 1000
    assert float(row["infection_predicted_ml"]) == pytest.approx(3 * voxel_ml)
    assert (
        float(row["infection_volume_error_ml"]) == pytest.approx(3 * voxel_ml) and float(row["infection_truth_ml"]) == 0
    )


def test_without_a_spacing_distances_and_volumes_are_empty_cells_and_counted() -> None:
    labels = np.full((1, 3, 3), 2, np.uint8)
    scored = [score_case(segmented("a1", "a", labels, labels, None), REGIONS)]
    row = rows_of_cases(CONFIG, scored)[0]
    assert row["infection_hd95_mm"] == row["infection_nsd_1mm"] == row["infection_truth_ml"] == ""
    summary = summarise(CONFIG, scored)
    assert summary["n_without_spacing"] == 1 and summary["regions"]["infection"]["hd95_mm"] == {
        "mean": None,
        "ci95": None,
        "n": 0,
    }
    assert summary["regions"]["infection"]["dice"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("policy", "dice", "nsd"), [("exclude", "", ""), ("one", "1.000000", "1.000000"), ("zero", "0.000000", "0.000000")]
)
def test_the_policy_for_empty_masks_is_the_same_for_overlaps_and_surfaces(policy: str, dice: str, nsd: str) -> None:
    config: Config = load_config(None, [f"evaluate.empty_masks={policy}", SAID])
    nothing = np.zeros((1, 3, 3), np.uint8)
    scored = [score_case(segmented("a1", "a", nothing, nothing), REGIONS)]
    (row,) = rows_of_cases(config, scored)
    assert (row["infection_dice"], row["infection_nsd_2mm"], row["infection_hd95_mm"]) == (dice, nsd, "")
    (row,) = rows_of_slices(config, scored)
    assert row["infection_dice"] == dice and row["z"] == 0
    nowhere = segmented("a1", "a", nothing, nothing)
    nowhere = dataclasses.replace(nowhere, case=dataclasses.replace(nowhere.case, spacing_mm=None))
    (row,) = rows_of_cases(config, [score_case(nowhere, REGIONS)])
    assert (row["infection_dice"], row["infection_nsd_2mm"]) == (dice, "")  # no surface without a spacing


def test_pixels_of_label_255_count_nowhere() -> None:
    truth = np.array([[[2, 255], [0, 0]]], np.uint8)
    mask = np.array([[[2, 2], [2, 0]]], np.uint8)
    one = segmented("a1", "a", truth, mask)
    one = dataclasses.replace(one, probability_RZYX=np.full((2, 1, 2, 2), 0.995, np.float32))
    scored = score_case(one, REGIONS)
    assert scored.counts_ZR4[0, 1].tolist() == [1, 1, 0, 1]
    assert scored.bins_R2K is not None and scored.bins_R2K[1].sum(axis=1).tolist() == [2, 1]


def test_thresholding_the_probability_bins_gives_the_counts_of_that_threshold() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, (3, 20, 20)).astype(np.uint8)
    probability = generator.random((2, 3, 20, 20), np.float32)
    probability[0, 0, 0, :3] = [0.0, 0.5, 1.0]
    one = dataclasses.replace(segmented("a1", "a", truth, truth), probability_RZYX=probability)
    found = probabilities(CONFIG, [score_case(one, REGIONS)])
    assert found is not None and found["bins"] == BINS
    for region, p, labels in zip(REGIONS, probability, REGIONS.values(), strict=True):
        inside = np.isin(truth, labels)
        for threshold in (0.0, 0.3, 0.5, 0.77, 0.99):
            start = round(threshold * BINS)
            assert sum(found["regions"][region]["positive"][start:]) == ((p >= np.float32(threshold)) & inside).sum()
            assert sum(found["regions"][region]["negative"][start:]) == ((p >= np.float32(threshold)) & ~inside).sum()
    assert probabilities(CONFIG, [score_case(segmented("b1", "b", truth, truth), REGIONS)]) is None


def test_a_part_of_a_volume_has_no_surface_scores() -> None:
    labels = np.full((2, 3, 3), 2, np.uint8)
    one = segmented("a1", "a", labels, labels)
    part = dataclasses.replace(one, z=np.array([1]), truth_ZYX=labels[1:], mask_ZYX=labels[1:])
    assert all(math.isnan(value) for value in score_case(part, REGIONS).distances["lung"].values())
    assert not math.isnan(score_case(one, REGIONS).distances["lung"]["hd95_mm"])
