"""What an evaluation has left in RUN/eval/<split>/, as a reader wants it: scores by level, failures, curves, pictures.

Files that an evaluation does not have are left out, as are columns of scores that it did not measure.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distseg.errors import DistsegError
from distseg.reporting.charts import NEUTRAL, Axis, Dot, Line, Mark, line_chart, scatter
from distseg.reporting.page import as_number, picture, read_table, shown
from distseg.reporting.probabilities import NEAR_ZERO, Calibration, best_threshold, calibration, threshold_scores
from distseg.runs.folder import RunFolder, best_metadata
from distseg.scoring.postprocessing import RULES, RegionRule, read_rules, rules_as_dict

LOW_DICE = 0.5
IN_TABLES = ("dice", "precision", "sensitivity", "nsd_2mm", "hd95_mm", "truth_ml", "predicted_ml")
COUNTS = ("tp", "fp", "fn", "tn")
RANKS = {"worst": "lowest Dice", "median": "median Dice", "best": "highest Dice"}
DOTS = 2000  # in a chart: more make a slow page


@dataclass(frozen=True)
class Failure:
    case: str
    patient: str
    region: str
    kind: str
    row: Mapping[str, str]
    """of per_case.csv"""

    def score(self, name: str) -> str:
        """Its figure, or count of voxels, in this region; "" where it was not measured."""
        return self.row.get(f"{self.region}_{name}", "")


@dataclass(frozen=True)
class Picture:
    name: str
    uri: str
    caption: str
    open: bool
    """shown at once; others when asked for"""


@dataclass(frozen=True)
class Level:
    """Scores over volumes, patients or slices, or pooled over voxels."""

    name: str
    entries: Mapping[str, Mapping[str, Any]]
    """score -> mean, ci95, n; pooled has the mean alone"""

    @property
    def width(self) -> int:
        """Columns of its figures."""
        return 3 if any("n" in entry for entry in self.entries.values()) else 1


@dataclass(frozen=True)
class Split:
    name: str
    summary: dict[str, Any]
    cases: list[dict[str, str]]
    patients: list[dict[str, str]]
    probabilities: dict[str, Any] | None
    pictures: list[Picture]
    stale: str | None = None
    """why these scores are no longer what the run would score, in a sentence"""
    again: str = ""
    """the command that scores it anew"""

    @property
    def title(self) -> str:
        return {"val": "Validation", "test": "Test"}.get(self.name, self.name)

    @property
    def regions(self) -> dict[str, Any]:
        return self.summary["regions"]

    def scores(self, region: str) -> list[str]:
        """All that were measured, in the order of the file."""
        entry = self.regions[region]
        return [name for name, values in entry.items() if isinstance(values, dict) and "mean" in values]

    def levels(self, region: str) -> list[Level]:
        entry = self.regions[region]
        pooled = {name: {"mean": value} for name, value in entry.get("pooled", {}).items()}
        found = [
            Level("Volumes", {name: entry[name] for name in self.scores(region)}),
            Level("Patients", entry.get("per_patient", {})),
            Level("Slices", entry.get("per_slice", {})),
            Level("Pooled voxels", pooled),
        ]
        return [level for level in found if level.entries]

    def columns(self, rows: Sequence[Mapping[str, str]]) -> list[str]:
        """The scores that a table of these rows shows."""
        region = next(iter(self.regions))
        return [name for name in IN_TABLES if rows and f"{region}_{name}" in rows[0]]

    @property
    def failures(self) -> list[Failure]:
        return [failure for row in self.cases for failure in self._failures_of(row)]

    @property
    def without_spacing(self) -> list[str]:
        """Cases whose volume in ml is unknown."""
        measured = [f"{region}_truth_ml" for region in self.regions]
        return [row["case"] for row in self.cases if any(row.get(name) == "" for name in measured)]

    def _failures_of(self, row: Mapping[str, str]) -> Iterator[Failure]:
        for region in self.regions:
            tp, fp, fn = (int(row[f"{region}_{name}"]) for name in COUNTS[:3])
            dice = as_number(row[f"{region}_dice"])
            if tp + fn == 0 and fp > 0:
                kind = "false alarm"
            elif tp + fp == 0 and fn > 0:
                kind = "missed"
            elif dice < LOW_DICE and tp + fp + fn > 0:
                kind = f"Dice below {LOW_DICE}"
            else:
                continue
            yield Failure(row["case"], row["patient"], region, kind, row)

    def threshold(self, region: str) -> float:
        """That the region's mask was made with."""
        rule = (self.summary.get("postprocessing") or {}).get(region) or {}
        return float(rule.get("threshold", self.summary["threshold"]))

    @property
    def thresholds(self) -> str:
        """In use: one, or one a region."""
        found = {region: self.threshold(region) for region in self.regions}
        if len(set(found.values())) == 1:
            return f"{next(iter(found.values())):g}"
        return ", ".join(f"{region} {threshold:g}" for region, threshold in found.items())

    @property
    def rules(self) -> list[str]:
        """Of post-processing, besides the threshold, in words; none where masks are as the model gave them."""
        found = self.summary.get("postprocessing") or {}
        told = [f"{region}: {words}" for region, rule in found.items() if (words := _rule_in_words(rule))]
        return told or (["thresholds alone"] if found else [])

    def counts(self, region: str) -> tuple[list[int], list[int]] | None:
        """Voxels in and outside the region by predicted probability."""
        found = ((self.probabilities or {}).get("regions") or {}).get(region)
        return (found["positive"], found["negative"]) if found else None


def read_splits(run: Path) -> list[Split]:
    """Every evaluation of a run, validation first."""
    folders = [run / "eval" / split for split in ("val", "test")]
    return [_read_split(run, folder) for folder in folders if (folder / "summary.json").is_file()]


def why_stale(run: Path, scored: Path, summary: Mapping[str, Any]) -> str | None:
    """Why scores are no longer what the run would score: better weights since, or other rules of post-processing.

    Args:
        run: its folder.
        scored: the summary.json of the scores.
        summary: what is in it.

    Returns:
        A sentence; None where they are new, or nobody can know.
    """
    step, best = (summary.get("model") or {}).get("step"), best_metadata(RunFolder(run)).get("step")
    if step is not None and best is not None and step != best:
        return f"Scored before the end: they are of the weights of step {step}; the best are of step {best} now."
    try:
        now = rules_as_dict(read_rules(run))
    except DistsegError:  # which `distseg evaluate` will say
        return None
    made_with = summary.get("postprocessing")
    # Scores without rules that are newer than the rules were asked for: `distseg evaluate --raw`.
    is_older = scored.stat().st_mtime < (run / RULES).stat().st_mtime if now is not None else False
    if now is None or _same_rules(made_with, now) or not (made_with or is_older):
        return None
    return f"They are older than the post-processing in {RULES}, which the run is scored with now."


def calibration_chart(split: Split, colours: Mapping[str, int]) -> Markup:
    """A line a region, in its colour: how often voxels of a probability are in it."""
    lines = [Line("perfect", [(0, 0), (1, 1)], NEUTRAL, "dashed")]
    found = dict(_calibrations(split))
    for region, curve in found.items():
        lines.append(Line(region, curve.points, colours[region], markers=True))
    x, y = Axis("predicted probability", 0.0, 1.0), Axis("share of voxels in the region", 0.0, 1.0)
    errors = ", ".join(f"{region} {shown(curve.error)}" for region, curve in found.items())
    above = ", ".join(f"{region} {shown(curve.error_above)}" for region, curve in found.items())
    note = f"Expected calibration error: {errors}; over voxels of probability {NEAR_ZERO} or more: {above}."
    return line_chart("Calibration", x, y, lines, note=note)


def threshold_chart(split: Split, region: str, colour: int) -> Markup:
    """Pooled Dice, precision and sensitivity against the threshold, the one in use marked."""
    counts = split.counts(region)
    assert counts is not None
    scores, used = threshold_scores(*counts), split.threshold(region)
    lines = [
        Line("precision", [(one.threshold, one.precision) for one in scores], colour, "dashed"),
        Line("sensitivity", [(one.threshold, one.sensitivity) for one in scores], colour, "dotted"),
        Line("Dice", [(one.threshold, one.dice) for one in scores], colour, strong=True),
    ]
    best = best_threshold(scores)
    at_used = min(scores, key=lambda one: abs(one.threshold - used))
    note = f"Pooled Dice of its own probability at {used:g}, the threshold in use: {shown(at_used.dice)}"
    if best is not None:
        note += f"; the highest, {shown(best.dice)}, at {best.threshold:g}"
    note += ". Scores are of the label map, in which regions lie over each other"
    note += ", after post-processing." if split.summary.get("postprocessing") else "."
    note += " A threshold is chosen on validation, never here." if split.name == "test" else ""
    marks = [Mark(used, f"in use {used:g}")]
    return line_chart(f"Thresholds, {region}", Axis("threshold", 0, 1), Axis("", 0, 1), lines, marks, note)


def size_chart(split: Split, colours: Mapping[str, int]) -> Markup | None:
    """Dice of each volume against the region's true size, in its colour; None where no size is known."""
    dots = [
        Dot(f"{row['case']}, {region}", as_number(row[f"{region}_truth_ml"]), as_number(row[f"{region}_dice"]), region)
        for region in split.regions
        for row in split.cases[:DOTS]
        if row.get(f"{region}_truth_ml")
    ]
    known = [dot for dot in dots if dot.x > 0 and not math.isnan(dot.y)]
    if not known:
        return None
    x = Axis.around("true volume, ml", [dot.x for dot in known], log=True)
    return scatter("Dice against size, volumes", x, Axis("Dice", 0, 1), known, list(split.regions), colours=colours)


def _rule_in_words(rule: Mapping[str, Any]) -> str:
    words = []
    if rule.get("seed_threshold") is not None:
        words.append(f"components with a voxel of {rule['seed_threshold']:g} or more")
    if rule.get("components") is not None:
        words.append(f"the {rule['components']} largest components")
    if rule.get("inside"):
        words.append(f"inside {rule['inside']}")
    return ", ".join(words)


def _calibrations(split: Split) -> Iterator[tuple[str, Calibration]]:
    for region in split.regions:
        if (counts := split.counts(region)) is not None:
            yield region, calibration(*counts)


def _same_rules(made_with: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Whether both make the same masks; what an older distseg did not write has its default."""
    if made_with is None or set(made_with) != set(now):
        return False
    default = rules_as_dict({region: RegionRule() for region in now}) or {}
    return all((default[region] | dict(made_with[region])) == now[region] for region in now)


def _command(run: Path, split: str, summary: Mapping[str, Any]) -> str:
    words = ["distseg", "evaluate", str(run), "--split", split, *(["--tta"] if summary.get("tta") else [])]
    if others := summary.get("ensemble"):
        words += ["--ensemble", *others]
    return shlex.join(words)


def _read_split(run: Path, folder: Path) -> Split:
    summary = json.loads((folder / "summary.json").read_text())
    bins = folder / "probabilities.json"
    return Split(
        folder.name,
        summary,
        read_table(folder / "per_case.csv"),
        read_table(folder / "per_patient.csv"),
        json.loads(bins.read_text()) if bins.is_file() else None,
        _pictures(folder / "figures", list(summary["regions"])),
        why_stale(run, folder / "summary.json", summary),
        _command(run, folder.name, summary),
    )


def _pictures(folder: Path, regions: Sequence[str]) -> list[Picture]:
    ranked = {f"{region}_{rank}": f"{region}, {which}" for region in regions for rank, which in RANKS.items()}
    others = {path.stem: path.stem for path in sorted(folder.glob("*.png")) if path.stem not in ranked}
    return [
        Picture(name, picture(folder / f"{name}.png"), caption, name.endswith("_worst"))
        for name, caption in (ranked | others).items()
        if (folder / f"{name}.png").is_file()
    ]
