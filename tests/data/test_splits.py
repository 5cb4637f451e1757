"""Folds of patients."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distseg.data.splits import MA2021_FOLDS, Folds, assign_folds, check_patients_apart, given_folds, ma2021_folds
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


@pytest.mark.parametrize(("share", "n_val"), [(0.1, 2), (0.2, 4), (0.35, 7), (0.4, 8), (0.5, 10), (0.001, 1)])
def test_a_holdout_is_its_share_of_the_patients_spread_over_the_burden(share: float, n_val: int) -> None:
    burden = {f"p{i}": i / 22 for i in range(22)}
    for seed in range(5):
        dealt = assign_folds(burden, 2, 2, seed, holdout=share)
        (fold,) = dealt.folds
        assert len(fold) == n_val and len(dealt.test) == 2 and not set(fold) & set(dealt.test)
        light = sum(burden[patient] < 0.5 for patient in fold)
        assert abs(light - n_val / 2) <= 1
    assert len({assign_folds(burden, 2, 2, seed, holdout=share).folds for seed in range(5)}) > 1


def test_the_benchmarks_folds_are_its_own_and_need_its_cases() -> None:
    cases = {case: case for fold in MA2021_FOLDS for case in fold}
    assert len(cases) == 20 and [set(fold) for fold in ma2021_folds(cases).folds] == [
        set(fold) for fold in MA2021_FOLDS
    ]
    with pytest.raises(DistsegError, match="got case mine; ma2021 knows the 20 cases"):
        ma2021_folds(cases | {"mine": "mine"})
    with pytest.raises(DistsegError, match="got no case of fold 3"):
        ma2021_folds({case: case for case in cases if case not in MA2021_FOLDS[3]})


def test_given_splits_are_kept() -> None:
    splits = {"a": "train", "b": "val", "c": "test", "d": "train", "e": "train"}
    burden = dict.fromkeys(splits, 0.5)
    assert given_folds(splits, burden, 5, 0) == Folds(0, (("b",),), ("c",), "given")
    without_val = given_folds({k: "train" if v == "val" else v for k, v in splits.items()}, burden, 2, 0)
    assert without_val.test == ("c",) and sorted(sum(without_val.folds, ())) == ["a", "b", "d", "e"]


def test_a_patient_in_two_places_is_named() -> None:
    with pytest.raises(DistsegError, match="got patient a in fold 0 and in test"):
        check_patients_apart(Folds(0, (("a",), ("b",)), ("a",)), "here")
