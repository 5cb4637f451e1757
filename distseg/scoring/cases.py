"""What a segmented case scores, and the means over cases, patients and slices, each with what it says about empty masks."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distseg.config import IGNORED_LABEL, Config
from distseg.kernels import region_bits, region_targets
from distseg.metrics import (
    EmptyPolicy,
    confusion_counts,
    mean_defined,
    none_if_undefined,
    patient_bootstrap_ci,
    scores_from_counts,
)
from distseg.scores import SURFACE_SCORES, VOLUMES
from distseg.scoring.segmenting import SegmentedCase
from distseg.scoring.surfaces import surface_scores

BINS = 100  # of probability; a threshold of two decimals is the edge of one
OUTCOMES = ("tp", "fp", "fn", "tn")

Scores = dict[str, float]


@dataclass(frozen=True)
class CaseScores:
    """What is kept of a case once its voxels are counted; undefined values are NaN."""

    case: str
    patient: str
    z: np.ndarray
    counts_ZR4: np.ndarray
    """tp, fp, fn, tn of each slice and region, pixels"""
    distances: Mapping[str, Scores]
    """region -> SURFACE_SCORES"""
    is_measured: bool
    """whether it has them: its slices are a whole volume with a spacing"""
    voxel_ml: float
    """NaN without a spacing"""
    bins_R2K: np.ndarray | None
    """voxels outside (0) and inside (1) each region by predicted probability; None where only masks are known"""


def score_case(segmented: SegmentedCase, regions: Mapping[str, Sequence[int]]) -> CaseScores:
    """Counts a case's voxels, and measures its surfaces where its slices are a whole volume with a spacing."""
    predicted_ZRYX, truth_ZRYX, valid_ZYX = _masks(segmented, regions)
    case = segmented.case
    spacing_mm = case.spacing_mm if len(segmented.z) == case.shape[0] else None
    distances = {
        name: surface_scores(predicted_ZRYX[:, r].numpy(), truth_ZRYX[:, r].numpy(), spacing_mm)
        for r, name in enumerate(regions)
    }
    bins_R2K = None
    if segmented.probability_RZYX is not None:
        valid = valid_ZYX.numpy()
        of_regions = zip(segmented.probability_RZYX, truth_ZRYX.unbind(1), strict=True)
        bins_R2K = np.stack([_histogram(p_ZYX[valid], t_ZYX.numpy()[valid]) for p_ZYX, t_ZYX in of_regions])
    voxel_ml = math.prod(case.spacing_mm) / 1000 if case.spacing_mm else math.nan
    counts_ZR4 = _counts(predicted_ZRYX, truth_ZRYX, valid_ZYX)
    return CaseScores(
        case.id, case.patient, segmented.z, counts_ZR4, distances, spacing_mm is not None, voxel_ml, bins_R2K
    )


def counts_of_case(segmented: SegmentedCase, regions: Mapping[str, Sequence[int]]) -> np.ndarray:
    """tp, fp, fn, tn of each region over a case's voxels: int64 (R, 4)."""
    return confusion_counts(*_masks(segmented, regions)).numpy()


def pooled_dice(segmented: Iterable[SegmentedCase], regions: Mapping[str, Sequence[int]]) -> dict[str, float | None]:
    """Dice of each region over the voxels of all cases; None where it is undefined."""
    counts_R4 = np.sum([counts_of_case(case, regions) for case in segmented], axis=0)
    dice = [scores_from_counts(counts)["dice"] for counts in counts_R4]
    return dict(zip(regions, map(none_if_undefined, dice), strict=True))


def _masks(
    segmented: SegmentedCase, regions: Mapping[str, Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction and truth of each region (Z, R, Y, X) where the truth is known, and where that is (Z, Y, X)."""
    bits, truth_ZYX = region_bits(regions), torch.from_numpy(segmented.truth_ZYX)
    valid_ZYX = truth_ZYX != IGNORED_LABEL
    predicted, truth = (region_targets(labels, bits) for labels in (torch.from_numpy(segmented.mask_ZYX), truth_ZYX))
    return predicted & valid_ZYX[:, None], truth, valid_ZYX


def _counts(predicted_ZRYX: torch.Tensor, truth_ZRYX: torch.Tensor, valid_ZYX: torch.Tensor) -> np.ndarray:
    """tp, fp, fn, tn of each slice and region (Z, R, 4)."""
    of_slices = zip(predicted_ZRYX.split(1), truth_ZRYX.split(1), valid_ZYX.split(1), strict=True)
    return torch.stack([confusion_counts(*of_slice) for of_slice in of_slices]).numpy()


def _histogram(probability_V: np.ndarray, truth_V: np.ndarray) -> np.ndarray:
    bins = np.minimum((probability_V * BINS).astype(np.int64), BINS - 1)
    return np.bincount(bins + BINS * truth_V, minlength=2 * BINS).reshape(2, BINS)


def scores_of_case(scored: CaseScores, index: int, region: str, empty: EmptyPolicy) -> Scores:
    """ALL_SCORES of one region of a case, over its voxels."""
    counts = scored.counts_ZR4[:, index].sum(axis=0)
    tp, fp, fn, _ = (int(n) for n in counts)
    distances = dict(scored.distances[region])
    if tp + fp + fn == 0 and empty != "exclude" and scored.is_measured:
        alike = {"one": 1.0, "zero": 0.0}[empty]
        distances |= {name: alike for name in distances if name.startswith("nsd")}
    truth_ml, predicted_ml = (tp + fn) * scored.voxel_ml, (tp + fp) * scored.voxel_ml
    volumes = dict(zip(VOLUMES, (truth_ml, predicted_ml, predicted_ml - truth_ml), strict=True))
    return scores_from_counts(counts, empty) | distances | volumes


def scores_of_patients(scored: Sequence[CaseScores], index: int, region: str, empty: EmptyPolicy) -> dict[str, Scores]:
    """ALL_SCORES of one region by patient: overlaps over all voxels of their volumes, else the mean of their volumes."""
    scores = {}
    for patient, own in _by_patient(scored).items():
        of_cases = [scores_of_case(case, index, region, empty) for case in own]
        means = {name: mean_defined([one[name] for one in of_cases]) for name in (*SURFACE_SCORES, *VOLUMES)}
        scores[patient] = scores_from_counts(_sum_of_counts(own)[index], empty) | means
    return scores


def summarise(config: Config, scored: Sequence[CaseScores]) -> dict[str, Any]:
    """Scores of each region: means over volumes, patients and slices with 95% patient bootstrap intervals, and pooled.

    Args:
        config: its regions, and in `evaluate` the policy for empty masks and the number of resamples.
        scored: at least one case.
    """
    empty, patients = config.evaluate.empty_masks, [case.patient for case in scored]
    regions = {}
    for index, region in enumerate(config.regions):
        counts_C4 = np.stack([case.counts_ZR4[:, index].sum(axis=0) for case in scored])
        of_cases = [scores_of_case(case, index, region, empty) for case in scored]
        of_patients = scores_of_patients(scored, index, region, empty)
        of_slices = [scores_from_counts(row, empty) for case in scored for row in case.counts_ZR4[:, index]]
        patient_of_slice = [case.patient for case in scored for _ in case.z]
        pooled = scores_from_counts(counts_C4.sum(axis=0), empty)
        regions[region] = _means(of_cases, patients, config) | {
            "per_patient": _means(list(of_patients.values()), list(of_patients), config),
            "per_slice": _means(of_slices, patient_of_slice, config),
            "pooled": {name: none_if_undefined(value) for name, value in pooled.items()},
            "n_empty_truth": int((counts_C4[:, 0] + counts_C4[:, 2] == 0).sum()),
            "n_empty_prediction": int((counts_C4[:, 0] + counts_C4[:, 1] == 0).sum()),
        }
    return {
        "n_cases": len(scored),
        "n_patients": len(set(patients)),
        "n_without_spacing": sum(math.isnan(case.voxel_ml) for case in scored),
        "empty_masks": empty,
        "bootstrap_resamples": config.evaluate.bootstrap_resamples,
        "regions": regions,
    }


def _means(scores: Sequence[Scores], patients: Sequence[str], config: Config) -> dict[str, Any]:
    found = {}
    for name in scores[0]:
        values = [one[name] for one in scores]
        low, high = patient_bootstrap_ci(values, patients, config.evaluate.bootstrap_resamples, config.seed)
        found[name] = {
            "mean": none_if_undefined(mean_defined(values)),
            "ci95": None if math.isnan(low) else [low, high],
            "n": sum(not math.isnan(value) for value in values),
        }
    return found


def rows_of_cases(config: Config, scored: Sequence[CaseScores]) -> list[dict[str, Any]]:
    """Of per_case.csv."""
    empty, regions = config.evaluate.empty_masks, list(config.regions)
    return [
        _row(
            {"case": case.case, "patient": case.patient},
            {region: scores_of_case(case, index, region, empty) for index, region in enumerate(regions)},
            case.counts_ZR4.sum(axis=0),
        )
        for case in scored
    ]


def rows_of_patients(config: Config, scored: Sequence[CaseScores]) -> list[dict[str, Any]]:
    """Of per_patient.csv."""
    empty = config.evaluate.empty_masks
    of_regions = {
        region: scores_of_patients(scored, index, region, empty) for index, region in enumerate(config.regions)
    }
    return [
        _row(
            {"case": "all", "patient": patient},
            {region: scores[patient] for region, scores in of_regions.items()},
            _sum_of_counts(own),
        )
        for patient, own in _by_patient(scored).items()
    ]


def rows_of_slices(config: Config, scored: Sequence[CaseScores]) -> list[dict[str, Any]]:
    """Of per_slice.csv."""
    empty = config.evaluate.empty_masks
    return [
        _row(
            {"case": case.case, "patient": case.patient, "z": int(z)},
            {region: scores_from_counts(row, empty) for region, row in zip(config.regions, counts_R4, strict=True)},
            counts_R4,
        )
        for case in scored
        for z, counts_R4 in zip(case.z, case.counts_ZR4, strict=True)
    ]


def _row(first: dict[str, Any], scores: Mapping[str, Scores], counts_R4: np.ndarray) -> dict[str, Any]:
    row = dict(first)
    for (region, values), counts in zip(scores.items(), counts_R4, strict=True):
        row |= {f"{region}_{name}": "" if math.isnan(value) else f"{value:.6f}" for name, value in values.items()}
        row |= {f"{region}_{kind}": int(n) for kind, n in zip(OUTCOMES, counts, strict=True)}
    return row


def probabilities(config: Config, scored: Sequence[CaseScores]) -> dict[str, Any] | None:
    """Of probabilities.json: voxels in and outside each region by predicted probability; None without probabilities."""
    bins = [case.bins_R2K for case in scored if case.bins_R2K is not None]
    if len(bins) < len(scored):
        return None
    total_R2K = np.sum(bins, axis=0).tolist()
    regions = {
        name: {"positive": positive, "negative": negative}
        for name, (negative, positive) in zip(config.regions, total_R2K, strict=True)
    }
    return {"bins": BINS, "regions": regions}


def _by_patient(scored: Iterable[CaseScores]) -> dict[str, list[CaseScores]]:
    of_patient: dict[str, list[CaseScores]] = {}
    for case in scored:
        of_patient.setdefault(case.patient, []).append(case)
    return of_patient


def _sum_of_counts(scored: Iterable[CaseScores]) -> np.ndarray:
    """(R, 4) over all slices."""
    return np.sum([case.counts_ZR4.sum(axis=0) for case in scored], axis=0)
