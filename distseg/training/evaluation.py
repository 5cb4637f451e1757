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
from tqdm import tqdm

from distseg.config import Config
from distseg.data.nifti import write_labels
from distseg.data.store import Case, Slices, Store, open_store
from distseg.errors import DistsegError
from distseg.files import folder_written_aside, locked, remove_leftovers, write_json
from distseg.tables import write_csv
from distseg.training.figures import draw_ranked_slices
from distseg.training.inference import (
    SegmentedCase,
    check_labels,
    inference_device,
    read_masks,
    segment_cases,
    split_slices,
)
from distseg.training.postprocessing import RULES, read_rules, rules_as_dict
from distseg.training.ranks import connect_ranks, disconnect_ranks, on_all, on_main
from distseg.training.run_folder import RunFolder, best_metadata, load_ensemble, open_run
from distseg.training.scoring import (
    CaseScores,
    probabilities,
    rows_of_cases,
    rows_of_patients,
    rows_of_slices,
    score_case,
    summarise,
)

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
    folder, config = open_run(run, overrides)
    opened = open_store(store or Path(config.data.store))
    slices = split_slices(config, opened, split)
    rules = None if raw else read_rules(run)
    if rules is not None and any(word.startswith("evaluate.threshold=") for word in overrides):
        raise DistsegError(
            f"override: got evaluate.threshold; {run / RULES} has the regions' own; leave it out, or give --raw"
        )
    members = [(folder, config), *(open_run(other) for other in ensemble)]
    _check_unseen(members, opened, slices.cases, split)

    def segmented(own: Slices) -> Iterator[SegmentedCase]:
        device = inference_device()
        segmenter = load_ensemble(members).to(device)
        yield from segment_cases(segmenter, opened, own, config, device, rules)

    made_by = {
        "model": best_metadata(folder),
        "tta": config.evaluate.tta,
        "tta_scales": list(config.evaluate.tta_scales),
        "window": config.evaluate.window,
        "ensemble": [str(path) for path in ensemble],
        "postprocessing": rules_as_dict(rules),
    }
    return _evaluate(run / "eval" / split, config, split, opened, slices, segmented, made_by)


def evaluate_masks(masks: Path, split: str, store: Path, config: Config) -> dict[str, Any]:
    """Scores a folder of label maps, MASKS/<case>.nii.gz, and writes MASKS/eval/<split>/.

    Args:
        masks: folder of the masks.
        split, store: whose cases.
        config: its regions, fold and `evaluate` section.

    Returns:
        What is in summary.json.

    Raises:
        DistsegError: a case without a mask, or a mask that is not on its volume's grid.
    """
    opened = open_store(store)
    check_labels(config, opened)
    slices = split_slices(config, opened, split)
    made_by: dict[str, Any] = dict.fromkeys(("model", "tta_scales", "window", "postprocessing"))
    made_by |= {"tta": False, "ensemble": []}
    return _evaluate(
        masks / "eval" / split, config, split, opened, slices, lambda own: read_masks(masks, opened, own), made_by
    )


def _check_unseen(members: Sequence[tuple[RunFolder, Config]], store: Store, cases: Sequence[Case], split: str) -> None:
    """Refuses runs that were trained on a patient, as they have noted it themselves: a store's folds may be dealt anew."""
    for number, (folder, config) in enumerate(members):
        if number == 0 and config.data.leaky_slice_split:
            continue  # that is what it is for; the summary says so
        trained = folder.patients("train") or {case.patient for case in split_slices(config, store, "train").cases}
        if seen := sorted(set(trained) & {case.patient for case in cases}):
            name, remedy = ("--ensemble", "use --split test") if number else ("run", "use the store it was trained on")
            raise DistsegError(
                f"{name}: got {folder.root}, which was trained on {len(seen)} of the patients of split {split} ({seen[0]}); "
                f"its score would be no score; {remedy}"
            )


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
    for case in tqdm(segmented, f"evaluate {split}", total=len(own.cases), unit="volume", disable=not seen):
        scored.append(score_case(case, config.regions))
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
