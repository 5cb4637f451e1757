"""Folds of patients."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distseg.data.splits import assign_folds
from distseg.errors import DistsegError


@given(st.integers(2, 40), st.integers(2, 6), st.integers(0, 5), st.integers(0, 9))
def test_every_patient_is_in_one_fold_or_in_test_and_folds_differ_by_at_most_one(
    patients: int, folds: int, test: int, seed: int
) -> None:
    burden = {f"p{i}": (i * 7 % 5) / 5 for i in range(patients)}
    if patients - test < folds:
        with pytest.raises(DistsegError, match="every fold needs a patient"):
            assign_folds(burden, folds, test, seed)
        return
    dealt = assign_folds(burden, folds, test, seed)
    everyone = [patient for fold in dealt.folds for patient in fold] + list(dealt.test)
    assert sorted(everyone) == sorted(burden) and len(dealt.test) == test
    sizes = [len(fold) for fold in dealt.folds]
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert dealt == assign_folds(dict(reversed(burden.items())), folds, test, seed)


def test_each_fold_gets_its_share_of_disease() -> None:
    burden = {f"p{i}": float(i >= 10) for i in range(20)}
    for seed in range(10):
        dealt = assign_folds(burden, 5, 0, seed)
        assert all(sum(burden[patient] for patient in fold) == 2 for fold in dealt.folds)


def test_another_seed_deals_otherwise() -> None:
    burden = {f"p{i}": i / 20 for i in range(20)}
    assert len({assign_folds(burden, 4, 2, seed).folds for seed in range(5)}) == 5
