"""Folds of patients: never of slices, since neighbouring slices of one patient are nearly the same picture."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distseg.errors import DistsegError

# The five validation folds of the benchmark on Zenodo 3757476 (Ma et al., Medical Physics 2021, task 1), for comparison
# with published figures only: they part radiopaedia_10 and radiopaedia_29, whose two series each are of one patient.
MA2021_FOLDS = (
    ("coronacases_008", "coronacases_007", "radiopaedia_36_86526_0", "radiopaedia_4_85506_1"),
    ("coronacases_009", "coronacases_004", "radiopaedia_14_85914_0", "radiopaedia_7_85703_0"),
    ("coronacases_010", "coronacases_001", "radiopaedia_10_85902_1", "radiopaedia_29_86491_1"),
    ("coronacases_003", "coronacases_005", "radiopaedia_40_86625_0", "radiopaedia_27_86410_0"),
    ("coronacases_002", "coronacases_006", "radiopaedia_10_85902_3", "radiopaedia_29_86490_1"),
)


@dataclass(frozen=True)
class Folds:
    """Who validates in each fold and who is in none (`test`). All others train.

    Members are patients; with `ma2021` they are cases, since the benchmark parts two patients.
    """

    seed: int
    folds: tuple[tuple[str, ...], ...]
    test: tuple[str, ...] = ()
    method: Literal["stratified", "ma2021", "given"] = "stratified"


def assign_folds(
    burden_of_patient: Mapping[str, float], n_folds: int, n_test: int, seed: int, holdout: float | None = None
) -> Folds:
    """Deals patients to test and folds, so that each gets a like share of light and heavy disease.

    Patients are sorted by burden and cut into runs of as many as there are folds; each run is dealt in random order. The test
    patients are drawn first, evenly along the burden.

    Args:
        burden_of_patient: any measure of disease, e.g. infected share of the lung, in [0, 1].
        n_folds: at least 2.
        n_test: patients that no fold sees, 0 or more.
        seed: of the random order.
        holdout: instead of them one fold, with this share (at most a half) of the patients that are not in test.

    Raises:
        DistsegError: a fold would have no patient.
    """
    check_fold_count(len(burden_of_patient), n_folds, n_test)
    rng = np.random.default_rng(seed)
    # A random order first, so that ties (no disease at all) do not go by name.
    shuffled = [sorted(burden_of_patient)[i] for i in rng.permutation(len(burden_of_patient))]
    ordered = sorted(shuffled, key=lambda patient: burden_of_patient[patient])
    test = [ordered[int((i + 0.5) * len(ordered) / n_test)] for i in range(n_test)]
    rest = [patient for patient in ordered if patient not in test]
    if holdout is not None:
        runs = np.array_split(rest, max(1, round(holdout * len(rest))))
        fold = sorted(str(run[rng.integers(len(run))]) for run in runs)
        return Folds(seed, (tuple(fold),), tuple(sorted(test)))
    folds: list[list[str]] = [[] for _ in range(n_folds)]
    for start in range(0, len(rest), n_folds):
        run = rest[start : start + n_folds]
        for fold, patient in zip(rng.permutation(n_folds), run, strict=False):
            folds[fold].append(patient)
    return Folds(seed, tuple(tuple(sorted(fold)) for fold in folds), tuple(sorted(test)))


def ma2021_folds(case_ids: Mapping[str, str]) -> Folds:
    """The benchmark's own folds, of the cases that are there.

    Args:
        case_ids: patient of each case.

    Raises:
        DistsegError: a case that the benchmark does not know, or a fold that would be empty.
    """
    known = {case for fold in MA2021_FOLDS for case in fold}
    if unknown := sorted(set(case_ids) - known):
        raise DistsegError(
            f"folds: got case {unknown[0]}; ma2021 knows the 20 cases of Zenodo 3757476 only; use stratified folds"
        )
    folds = tuple(tuple(sorted(set(fold) & set(case_ids))) for fold in MA2021_FOLDS)
    if empty := [number for number, fold in enumerate(folds) if not fold]:
        raise DistsegError(
            f"folds: got no case of fold {empty[0]} of ma2021; each needs one; add cases, or use stratified folds"
        )
    return Folds(0, folds, method="ma2021")


def given_folds(
    split_of_patient: Mapping[str, str],
    burden_of_patient: Mapping[str, float],
    n_folds: int,
    seed: int,
    holdout: float | None = None,
    fold_of_patient: Mapping[str, int] | None = None,
) -> Folds:
    """Splits that the source names: `train`, `val`, `test` for each patient, or the fold of each that is not in test.

    Without a `val` or folds, folds are made of `train`.
    """
    members = {
        split: tuple(sorted(p for p, named in split_of_patient.items() if named == split))
        for split in ("train", "val", "test")
    }
    if fold_of_patient:
        numbers = range(max(fold_of_patient.values()) + 1)
        folds = tuple(tuple(sorted(p for p, own in fold_of_patient.items() if own == number)) for number in numbers)
        return Folds(seed, folds, members["test"], "given")
    if members["val"]:
        return Folds(seed, (members["val"],), members["test"], "given")
    train = {patient: burden_of_patient[patient] for patient in members["train"]}
    return replace(assign_folds(train, n_folds, 0, seed, holdout), test=members["test"])


def check_fold_count(n_patients: int, n_folds: int, n_test: int) -> None:
    """Refuses folds that would have no patient, before any volume is read."""
    if n_patients - n_test < n_folds:
        raise DistsegError(
            f"folds: got {n_folds} folds and {n_test} test patients for {n_patients} patients; every fold needs a "
            "patient; use fewer --folds or --test-patients, or tell patients apart with --patients 'REGEX' or a CSV, see docs/data.md"
        )


def check_patients_apart(folds: Folds, where: str) -> None:
    """Refuses a patient who stands in two folds, or in a fold and in test."""
    seen: dict[str, str] = {}
    groups = [(f"fold {k}", members) for k, members in enumerate(folds.folds)] + [("test", folds.test)]
    for group, members in groups:
        for patient in members:
            if seen.setdefault(patient, group) != group:
                raise DistsegError(
                    f"folds: got patient {patient} in {seen[patient]} and in {group} ({where}); a patient belongs to one; "
                    "run `distseg prepare` again"
                )
