"""Paired comparisons and requirements, on evaluations written by hand."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from scipy.stats import wilcoxon

from distseg.errors import DistsegError
from distseg.scoring.comparison import COMPARED, compare_runs, parse_requirement

PATIENTS = ("a", "a", "b", "c", "d", "e", "f")
FIRST = (0.5, 0.6, 0.7, 0.4, 0.9, 0.2, 0.8)
SECOND = (0.6, 0.7, 0.75, 0.5, 0.85, 0.5, 0.9)


def evaluation(run: Path, dice: tuple[float | str, ...], settings: Mapping[str, object] | None = None) -> Path:
    folder = run / "eval" / "val"
    folder.mkdir(parents=True)
    names = [f"infection_{score}" for score in COMPARED]
    with (folder / "per_case.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "patient", *names])
        writer.writerows([f"case{i}", PATIENTS[i], *[value] * len(names)] for i, value in enumerate(dice))
    summary = {
        "regions": {"infection": {"dice": {"mean": 0.6, "n": 7}, "hd95_mm": {"mean": None}, "pooled": {"dice": 0.75}}},
        "empty_masks": "exclude", "leaky_slice_split": False, "bootstrap_resamples": 500,
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**summary, **(settings or {})}))
    return run


def test_differences_are_paired_by_case_and_resampled_by_patient(tmp_path: Path) -> None:
    runs = evaluation(tmp_path / "one", FIRST), evaluation(tmp_path / "two", SECOND)
    found = compare_runs(*runs, "val")
    assert (found["n_cases"], found["n_patients"]) == (7, 6)
    dice = found["regions"]["infection"]["dice"]
    differences = [b - a for a, b in zip(FIRST, SECOND, strict=True)]
    assert dice["difference"] == pytest.approx(sum(differences) / 7)
    assert dice["ci95"][0] < dice["difference"] < dice["ci95"][1]
    of_patients = [(differences[0] + differences[1]) / 2, *differences[2:]]
    assert dice["p"] == pytest.approx(wilcoxon(of_patients, zero_method="zsplit").pvalue)
    back = compare_runs(*reversed(runs), "val")["regions"]["infection"]["dice"]
    assert back["difference"] == pytest.approx(-dice["difference"]) and back["p"] == pytest.approx(dice["p"])


def test_a_run_equals_itself_and_undefined_cases_are_left_out_of_both(tmp_path: Path) -> None:
    run = evaluation(tmp_path / "one", FIRST)
    same = compare_runs(run, run, "val")["regions"]["infection"]["dice"]
    assert same["difference"] == 0 and same["p"] == 1.0 and same["ci95"] == [0.0, 0.0]
    other = evaluation(tmp_path / "two", ("", *SECOND[1:]))
    dice = compare_runs(run, other, "val")["regions"]["infection"]["dice"]
    assert dice["n"] == 6 and dice["first"] == pytest.approx(sum(FIRST[1:]) / 6)


def test_false_alarms_that_one_of_them_makes_are_counted(tmp_path: Path) -> None:
    """A healthy case that is left empty has no Dice, so a false alarm there, which scores 0, is in no pair."""
    runs = evaluation(tmp_path / "one", ("", "", *FIRST[2:])), evaluation(tmp_path / "two", (0.0, "", *FIRST[2:]))
    dice = compare_runs(*runs, "val")["regions"]["infection"]["dice"]
    assert (dice["n"], dice["n_only_first"], dice["n_only_second"]) == (5, 0, 1) and dice["n_patients"] == 5


def test_ties_are_ties_whatever_their_last_bit(tmp_path: Path) -> None:
    first, second = (0.1, 0.1, 0.7, 0.4, 0.6, 0.8, 0.3), (0.2, 0.2, 0.8, 0.5, 0.7, 0.7, 0.2)
    dice = compare_runs(evaluation(tmp_path / "one", first), evaluation(tmp_path / "two", second), "val")
    assert dice["regions"]["infection"]["dice"]["p"] == pytest.approx(
        wilcoxon([1, 1, 1, 1, -1, -1], zero_method="zsplit").pvalue
    )


@pytest.mark.parametrize(
    ("dice", "settings", "message"),
    [
        (FIRST, {"regions": {"lesion": {}}}, "regions infection and .* with lesion; only the same regions"),
        (FIRST[:5], {}, "only the same cases can be compared"),
        (FIRST, {"empty_masks": "one"}, "empty_masks exclude and .* with one"),
        (FIRST, {"leaky_slice_split": True}, "leaky_slice_split False and .* with True"),
    ],
)
def test_what_was_scored_otherwise_is_not_compared(
    dice: tuple[float, ...], settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    runs = evaluation(tmp_path / "one", FIRST), evaluation(tmp_path / "two", dice, settings)
    with pytest.raises(DistsegError, match=message):
        compare_runs(*runs, "val")


def test_a_run_that_is_not_scored_is_named(tmp_path: Path) -> None:
    with pytest.raises(DistsegError, match="which is not scored on split test; run `distseg evaluate"):
        compare_runs(evaluation(tmp_path / "one", FIRST), tmp_path / "two", "test")


def test_a_requirement_holds_or_says_by_how_much_it_does_not(tmp_path: Path) -> None:
    summary = json.loads((evaluation(tmp_path / "one", FIRST) / "eval/val/summary.json").read_text())
    for text in ("infection.dice>=0.6", "infection.dice > 0.59", "infection.pooled.dice<=0.75", "infection.dice<1"):
        assert parse_requirement(text).unmet(summary) is None
    assert parse_requirement("infection.dice>=0.70").unmet(summary) == "infection.dice is 0.6000, required >= 0.7"
    assert parse_requirement("infection.hd95_mm<=9").unmet(summary) == "infection.hd95_mm is undefined, required <= 9"
    with pytest.raises(DistsegError, match=r"the regions are infection; name one of them"):
        parse_requirement("lesion.dice>=0.7").unmet(summary)
    for wrong in (
        "infection.foo",
        "infection.pooled",
        "infection.dice.ci95",
        "infection.pooled.hd95_mm",
        "infection.a.b.dice",
    ):
        with pytest.raises(
            DistsegError, match="there are dice, iou, .* after infection., .*infection.pooled.; name one"
        ):
            parse_requirement(f"{wrong}>=0.7").check(["infection"])
    for text in ("infection>=0.7", "infection.dice=0.7", "infection.dice>=high"):
        with pytest.raises(ValueError, match="must be region.score>=value"):
            parse_requirement(text)
