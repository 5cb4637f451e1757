"""Two evaluations case by case, and requirements that a score must meet."""

import json
import math
import operator
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distseg.errors import DistsegError
from distseg.metrics import mean_defined, none_if_undefined, patient_bootstrap_ci
from distseg.scores import ALL_SCORES, EMPTY_COUNTS, MEANS
from distseg.tables import read_csv

COMPARED = ("dice", "nsd_1mm", "nsd_2mm", "hd95_mm")
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True)
class Requirement:
    """`region.score>=value`; `region.pooled.score`, `region.per_patient.score` and `region.per_slice.score` likewise."""

    text: str
    path: tuple[str, ...]
    sign: str
    value: float

    def check(self, regions: Collection[str]) -> None:
        """Refuses a region or a score that there is not, before anything is scored."""
        if self.path[0] not in regions:
            raise DistsegError(f"--require: got {self.text}; the regions are {', '.join(regions)}; name one of them")
        *mean, score = self.path[1:]
        scores_after: dict[tuple[str, ...], Sequence[str]] = {(name,): scores for name, scores in MEANS.items()}
        known = scores_after.get(tuple(mean), ()) if mean else (*ALL_SCORES, *EMPTY_COUNTS)
        if score not in known:
            scores, means = ", ".join(known or ALL_SCORES), " or ".join(f"{self.path[0]}.{name}." for name in MEANS)
            raise DistsegError(
                f"--require: got {self.text}; there are {scores} after {self.path[0]}., {means}; name one of them"
            )

    def unmet(self, summary: dict[str, Any]) -> str | None:
        """What the score is where it does not do; None where it does. A score that is undefined does not.

        Args:
            summary: of `distseg evaluate`.

        Raises:
            DistsegError: no such region or score.
        """
        self.check(summary["regions"])
        found: Any = summary["regions"]
        for key in self.path:
            found = found[key]
        score = found["mean"] if isinstance(found, dict) else found
        if score is not None and OPERATORS[self.sign](score, self.value):
            return None
        return f"{'.'.join(self.path)} is {'undefined' if score is None else f'{score:.4f}'}, required {self.sign} {self.value:g}"


def parse_requirement(text: str) -> Requirement:
    """Reads `infection.dice>=0.70`.

    Raises:
        ValueError: it is not of that form.
    """
    found = re.fullmatch(r"([\w-]+(?:\.[\w-]+)+)\s*(>=|<=|>|<)\s*([-+.\deE]+)", text)
    if found is None:
        raise ValueError(f"got {text!r}; must be region.score>=value, such as infection.dice>=0.70")
    return Requirement(text, tuple(found[1].split(".")), found[2], float(found[3]))


def compare_runs(first: Path, second: Path, split: str) -> dict[str, Any]:
    """Differences of two evaluated runs, second minus first, paired by case.

    Args:
        first, second: folders that `distseg evaluate` has scored.
        split: "val" or "test".

    Returns:
        n_cases, n_patients, and by region and score: `first` and `second` (means over the cases where both are defined),
        `difference`, `ci95` (patient bootstrap of the mean difference) and `p` (Wilcoxon's signed-rank test over the
        patients' mean differences, two-sided); None where undefined. `n` cases and `n_patients` are behind them; `n_only_first`
        and `n_only_second` cases are left out, for the score is undefined in the other run: it found nothing in a healthy case.

    Raises:
        DistsegError: a run that is not scored, or two that were not scored on the same cases and regions.
    """
    summaries, tables = zip(*(_read(run, split) for run in (first, second)), strict=True)
    a, b = summaries
    for what, one, other in (
        ("regions", sorted(a["regions"]), sorted(b["regions"])),
        ("cases", sorted(tables[0]), sorted(tables[1])),
        ("empty_masks", a["empty_masks"], b["empty_masks"]),
        ("leaky_slice_split", a["leaky_slice_split"], b["leaky_slice_split"]),
    ):
        if one != other:
            raise DistsegError(
                f"--compare: got {first} with {what} {_short(one)} and {second} with {_short(other)}; only the same {what} can "
                "be compared; score both alike"
            )
    patients = [row["patient"] for row in tables[0].values()]
    resamples = min(a["bootstrap_resamples"], b["bootstrap_resamples"])
    regions = {
        region: {score: _paired(tables, patients, f"{region}_{score}", resamples) for score in COMPARED}
        for region in a["regions"]
    }
    return {"split": split, "n_cases": len(patients), "n_patients": len(set(patients)), "regions": regions}


def _paired(
    tables: Sequence[dict[str, dict[str, str]]], patients: Sequence[str], column: str, resamples: int
) -> dict[str, Any]:
    first, second = ([float(tables[i][case][column] or "nan") for case in tables[0]] for i in (0, 1))
    # As many digits as the tables have: binary noise would break Wilcoxon's ties.
    differences = [round(y - x, 6) for x, y in zip(first, second, strict=True)]
    both = [not math.isnan(difference) for difference in differences]
    only_first, only_second = (
        sum(not math.isnan(x) and math.isnan(y) for x, y in zip(one, other, strict=True))
        for one, other in ((first, second), (second, first))
    )
    low, high = patient_bootstrap_ci(differences, patients, resamples)
    of_patients = [
        mean_defined([d for d, p in zip(differences, patients, strict=True) if p == patient])
        for patient in dict.fromkeys(patients)
    ]
    of_patients = [difference for difference in of_patients if not math.isnan(difference)]
    return {
        "first": none_if_undefined(mean_defined([x for x, kept in zip(first, both, strict=True) if kept])),
        "second": none_if_undefined(mean_defined([y for y, kept in zip(second, both, strict=True) if kept])),
        "difference": none_if_undefined(mean_defined(differences)),
        "ci95": None if math.isnan(low) else [low, high],
        "p": _wilcoxon_p(of_patients),
        "n": sum(both),
        "n_patients": len(of_patients),
        "n_only_first": only_first,
        "n_only_second": only_second,
    }


def _wilcoxon_p(differences: Sequence[float]) -> float | None:
    """None for fewer than two patients; 1 where nothing differs."""
    if len(differences) < 2:
        return None
    if not np.any(differences):
        return 1.0
    from scipy.stats import wilcoxon  # here: it takes as long as all the rest

    return float(wilcoxon(differences, zero_method="zsplit").pvalue)


def _read(run: Path, split: str) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    folder = run / "eval" / split
    try:
        summary = json.loads((folder / "summary.json").read_text())
        return summary, {row["case"]: row for row in read_csv(folder / "per_case.csv")}
    except FileNotFoundError:
        raise DistsegError(
            f"--compare: got {run}, which is not scored on split {split}; run `distseg evaluate {run} --split {split}` first"
        ) from None


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
