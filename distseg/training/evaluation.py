"""Honest scores of a run: per case, per patient and pooled, each with what it says about empty masks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distseg.config import Config
from distseg.data.store import Case, open_store
from distseg.files import folder_written_aside, write_json
from distseg.metrics import (
    SCORES,
    EmptyPolicy,
    mean_defined,
    none_if_undefined,
    patient_bootstrap_ci,
    scores_from_counts,
)
from distseg.training.figures import draw_overlays, telling_slices
from distseg.training.inference import inference_device, score_cases
from distseg.training.run_folder import best_metadata, load_best, open_run, write_csv

OVERLAY_CASES = 4  # a picture per case up to here: enough to look at, few enough to draw


def evaluate_run(run: Path, split: str, store: Path | None = None) -> dict[str, Any]:
    """Scores the best weights of a run and writes RUN/eval/<split>/: per_case.csv, per_patient.csv, summary.json, figures/.

    Args:
        run: folder of the run.
        split: "val" (the fold it was validated on) or "test".
        store: another place of the store; None: as in the run's config.

    Returns:
        What is in summary.json; undefined values are None.
    """
    folder, config = open_run(run)
    opened = open_store(store or Path(config.data.store))
    slices = opened.slices_of_split(split, config.data.fold, config.seed if config.data.leaky_slice_split else None)
    cases = slices.cases
    device = inference_device()
    _, segmenter = load_best(folder, config)
    with folder_written_aside(run / "eval" / split) as aside:
        counts: dict[str, np.ndarray] = {}
        scored_cases = score_cases(
            segmenter.to(device), opened, slices, config.regions, device, config.evaluate.batch_size
        )
        for scored in tqdm(scored_cases, f"evaluate {split}", total=len(cases), unit="volume"):
            counts[scored.case.id] = scored.counts_R4
            if len(counts) <= OVERLAY_CASES:
                draw_overlays(telling_slices(scored), aside / "figures" / f"{scored.case.id}.png")
        summary = summarise(config, split, cases, counts) | {"model": best_metadata(folder)}
        policy, regions = config.evaluate.empty_masks, list(config.regions)
        write_csv(aside / "per_case.csv", [_row(c.id, c.patient, regions, counts[c.id], policy) for c in cases])
        of_patients = _counts_of_patients(cases, counts)
        write_csv(aside / "per_patient.csv", [_row("all", p, regions, n, policy) for p, n in of_patients.items()])
        write_json(aside / "summary.json", summary)
    return summary


def summarise(
    config: Config, split: str, cases: Sequence[Case], counts_of_case: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Means over cases with 95% patient bootstrap intervals, and scores of all voxels pooled, for each region.

    Args:
        config: of the run; its `evaluate` section holds the policy for empty masks.
        split: name for the record.
        cases: what was scored.
        counts_of_case: case id -> (R, 4) tp, fp, fn, tn.
    """
    settings = config.evaluate
    regions = {}
    for index, region in enumerate(config.regions):
        counts = [counts_of_case[case.id][index] for case in cases]
        scores = [scores_from_counts(n, settings.empty_masks) for n in counts]
        patients = [case.patient for case in cases]
        entry: dict[str, Any] = {}
        for name in SCORES:
            values = [score[name] for score in scores]
            interval = patient_bootstrap_ci(values, patients, settings.bootstrap_resamples, config.seed)
            entry[name] = {
                "mean": none_if_undefined(mean_defined(values)),
                "ci95": None if math.isnan(interval[0]) else list(interval),
                "n": sum(not math.isnan(value) for value in values),
            }
        pooled = scores_from_counts(np.sum(counts, axis=0), settings.empty_masks)
        entry["pooled"] = {name: none_if_undefined(value) for name, value in pooled.items()}
        entry["n_empty_truth"] = sum(int(tp + fn == 0) for tp, _, fn, _ in counts)
        entry["n_empty_prediction"] = sum(int(tp + fp == 0) for tp, fp, _, _ in counts)
        regions[region] = entry
    return {
        "split": split,
        "fold": config.data.fold,
        "leaky_slice_split": config.data.leaky_slice_split,
        "n_cases": len(cases),
        "n_patients": len({case.patient for case in cases}),
        "empty_masks": settings.empty_masks,
        "threshold": settings.threshold,
        "bootstrap_resamples": settings.bootstrap_resamples,
        "regions": regions,
    }


def _counts_of_patients(cases: Sequence[Case], counts_of_case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A patient's score is that of all the voxels of their volumes."""
    counts: dict[str, np.ndarray] = {}
    for case in cases:
        counts[case.patient] = counts.get(case.patient, 0) + counts_of_case[case.id]
    return counts


def _row(name: str, patient: str, regions: Sequence[str], counts_R4: np.ndarray, policy: EmptyPolicy) -> dict[str, Any]:
    row: dict[str, Any] = {"case": name, "patient": patient}
    for region, counts in zip(regions, counts_R4, strict=True):
        scores = scores_from_counts(counts, policy)
        row |= {f"{region}_{score}": "" if math.isnan(value) else f"{value:.6f}" for score, value in scores.items()}
        row |= {f"{region}_{kind}": int(n) for kind, n in zip(("tp", "fp", "fn", "tn"), counts, strict=True)}
    return row
