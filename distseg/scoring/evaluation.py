"""Honest scores of a run, or of masks that something else made, in `eval/<split>/`; any number of ranks gives the same figures.

eval/<split>/  summary.json  per_case.csv  per_patient.csv  per_slice.csv  probabilities.json  masks/<case>.nii.gz
               figures/<region>_<worst|median|best>.png
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distseg.bars import counted
from distseg.config import Config
from distseg.data.nifti import write_labels
from distseg.data.store import Slices, Store
from distseg.files import folder_written_aside, locked, remove_leftovers, write_json
from distseg.ranks import connect_ranks, disconnect_ranks, on_all, on_main
from distseg.runs.folder import best_metadata
from distseg.runs.trained import load_ensemble
from distseg.scoring.cases import (
    CaseScores,
    probabilities,
    rows_of_cases,
    rows_of_patients,
    rows_of_slices,
    score_case,
    summarise,
)
from distseg.scoring.figures import draw_ranked_slices
from distseg.scoring.postprocessing import rules_as_dict
from distseg.scoring.segmenting import SegmentedCase, inference_device, read_masks, segment_cases
from distseg.scoring.to_score import EVALUATED, MasksToScore, RunToScore, masks_to_score, run_to_score
from distseg.tables import write_csv

UNEVEN_S = 86400.0  # ranks wait for each other's whole cases, not for a step


def evaluate_run(
    run: Path,
    split: str,
    store: Path | None = None,
    overrides: Sequence[str] = (),
    ensemble: Sequence[Path] = (),
    raw: bool = False,
) -> dict[str, Any]:
    """Scores the best weights of a run and writes RUN/eval/<split>/.

    Args:
        run: folder of the run.
        split: "val" (the fold it was validated on) or "test".
        store: another place of the store; None: as in the run's config.
        overrides: `evaluate.key=value` over the run's config.
        ensemble: other runs, whose probabilities are averaged with this one's.
        raw: leave out RUN/postprocessing.json, where there is one.

    Returns:
        What is in summary.json; undefined values are None.

    Raises:
        DistsegError: no finished run, no case in the split, or a member of the ensemble that has seen the split's patients.
    """
    return score_run(run_to_score(run, split, store, overrides, ensemble, raw))


def score_run(found: RunToScore) -> dict[str, Any]:
    """Scores a run that was looked at; see `evaluate_run`."""
    config = found.config

    def segmented(own: Slices) -> Iterator[SegmentedCase]:
        device = inference_device()
        segmenter = load_ensemble(found.members).to(device)
        yield from segment_cases(segmenter, found.store, own, config, device, found.rules)

    made_by = {
        "model": best_metadata(found.folder),
        "tta": config.evaluate.tta,
        "tta_scales": list(config.evaluate.tta_scales),
        "window": config.evaluate.window,
        "ensemble": [str(folder.root) for folder, _ in found.members[1:]],
        "postprocessing": rules_as_dict(found.rules),
    }
    out = found.folder.root / "eval" / found.split
    return _evaluate(out, config, found.split, found.store, found.slices, segmented, made_by)


def evaluate_masks(masks: Path, split: str, store: Path, config: Config) -> dict[str, Any]:
    """Scores a folder of label maps, MASKS/<case>.nii.gz or of another format, and writes MASKS/eval/<split>/.

    Args:
        masks: folder of the masks.
        split, store: whose cases.
        config: its regions, fold and `evaluate` section.

    Returns:
        What is in summary.json.

    Raises:
        DistsegError: a case without a mask, or a mask that is not on its volume's grid.
    """
    return score_masks(masks_to_score(masks, split, store, config))


def score_masks(found: MasksToScore) -> dict[str, Any]:
    """Scores masks that were found; see `evaluate_masks`."""
    made_by: dict[str, Any] = dict.fromkeys(("model", "tta_scales", "window", "postprocessing"))
    made_by |= {"tta": False, "ensemble": []}

    def segmented(own: Slices) -> Iterator[SegmentedCase]:
        return read_masks(found.files, found.store, own)

    out = found.folder / EVALUATED / found.split
    return _evaluate(out, found.config, found.split, found.store, found.slices, segmented, made_by)


def _evaluate(
    out: Path,
    config: Config,
    split: str,
    store: Store,
    slices: Slices,
    segmented: Callable[[Slices], Iterable[SegmentedCase]],
    made_by: dict[str, Any],
) -> dict[str, Any]:
    """Every rank scores its share of the cases; rank 0 writes what all of them found."""
    launched = dataclasses.replace(config.train, trackers=(), timeout_s=UNEVEN_S)
    ranks = connect_ranks(dataclasses.replace(config, train=launched))
    clean = False
    try:
        with contextlib.ExitStack() as held:
            aside = Path(on_main(ranks, lambda: str(_begin(out, held))))
            own = slices.of_cases(range(ranks.process_index, len(slices.cases), ranks.num_processes))
            found = on_all(ranks, lambda: _score(segmented(own), own, config, aside, split, ranks.is_main_process))
            scored = sorted(itertools.chain(*found), key=lambda one: one.case)
            summary = {
                "split": split,
                "fold": config.data.fold,
                "leaky_slice_split": config.data.leaky_slice_split,
                "threshold": config.evaluate.threshold,
                **made_by,
                **summarise(config, scored),
            }
            on_main(ranks, lambda: _write(aside, config, store, scored, summary))
        clean = True
    finally:
        disconnect_ranks(clean)
    return summary


def _begin(out: Path, held: contextlib.ExitStack) -> Path:
    """The folder to fill, which no other process does at the same time."""
    held.enter_context(locked(out.with_name(f".lock-{out.name}"), f"evaluation: got {out}"))
    remove_leftovers(out)
    return held.enter_context(folder_written_aside(out))


def _score(
    segmented: Iterable[SegmentedCase], own: Slices, config: Config, aside: Path, split: str, seen: bool
) -> list[CaseScores]:
    scored = []
    for case in counted(segmented, f"evaluate {split}", len(own.cases), "volume", shown=seen):
        scored.append(score_case(case, config.region_labels))
        mask_ZYX = np.zeros(case.case.shape, np.uint8)  # the leaky split scores some slices of a case only
        mask_ZYX[case.z] = case.mask_ZYX
        write_labels(aside / "masks" / f"{case.case.id}.nii.gz", mask_ZYX, case.case.spacing_mm)
    return scored


def _write(aside: Path, config: Config, store: Store, scored: Sequence[CaseScores], summary: dict[str, Any]) -> None:
    write_csv(aside / "per_case.csv", rows_of_cases(config, scored))
    write_csv(aside / "per_patient.csv", rows_of_patients(config, scored))
    write_csv(aside / "per_slice.csv", rows_of_slices(config, scored))
    if (bins := probabilities(config, scored)) is not None:
        write_json(aside / "probabilities.json", bins)
    draw_ranked_slices(aside, store, list(config.regions), scored)
    write_json(aside / "summary.json", summary)
