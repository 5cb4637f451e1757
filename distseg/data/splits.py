"""Folds of patients: never of slices, since neighbouring slices of one patient are nearly the same picture."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distseg.errors import DistsegError


@dataclass(frozen=True)
class Folds:
    """Patients of each validation fold, and those of no fold (`test`). In fold k, all other folds train."""

    seed: int
    folds: tuple[tuple[str, ...], ...]
    test: tuple[str, ...] = ()


def assign_folds(burden_of_patient: Mapping[str, float], n_folds: int, n_test: int, seed: int) -> Folds:
    """Deals patients to test and folds, so that each gets a like share of light and heavy disease.

    Patients are sorted by burden and cut into runs of as many as there are groups; each run is dealt in random order. A
    group is a fold; the test patients are drawn first, evenly along the burden.

    Args:
        burden_of_patient: any measure of disease, e.g. infected share of the lung, in [0, 1].
        n_folds: at least 2.
        n_test: patients that no fold sees, 0 or more.
        seed: of the random order.

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
    folds: list[list[str]] = [[] for _ in range(n_folds)]
    for start in range(0, len(rest), n_folds):
        run = rest[start : start + n_folds]
        for fold, patient in zip(rng.permutation(n_folds), run, strict=False):
            folds[fold].append(patient)
    return Folds(seed, tuple(tuple(sorted(fold)) for fold in folds), tuple(sorted(test)))


def check_fold_count(n_patients: int, n_folds: int, n_test: int) -> None:
    """Refuses folds that would have no patient, before any volume is read."""
    if n_patients - n_test < n_folds:
        raise DistsegError(
            f"folds: got {n_folds} folds and {n_test} test patients for {n_patients} patients; every fold needs a "
            "patient; use fewer --folds or --test-patients, or add patients"
        )
