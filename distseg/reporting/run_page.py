"""The page about a run: what it scored, where it failed, how it learned, and what it was made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distseg.config import Config
from distseg.config_files import config_as_yaml
from distseg.data.store import Store, open_store, split_slices
from distseg.errors import DistsegError
from distseg.regions import own_labels
from distseg.reporting.charts import NEUTRAL, Axis, Line, Mark, interval_strip, line_chart
from distseg.reporting.evaluated import Split, calibration_chart, read_splits, size_chart, threshold_chart
from distseg.reporting.page import as_number, picture, render, shown
from distseg.runs.folder import best_metadata, open_run
from distseg.tables import read_rows

MOST_POINTS = 300  # of a training curve: further steps are averaged
MOST_NAMES = 200  # of patients


@dataclass(frozen=True)
class Patients:
    """Who is in a split."""

    split: str
    n_volumes: int
    n_patients: int
    names: list[str]
    """of the first MOST_NAMES"""


def run_page(run: Path) -> tuple[str, list[str]]:
    """The page, and a line a score.

    Raises:
        DistsegError: no run with a best model there.
    """
    folder, config = open_run(run)
    splits = read_splits(run)
    best = best_metadata(folder)
    rows = read_rows(folder.metrics)
    patients, no_patients = _patients(config)
    overlays = folder.figures / "overlays.png"
    environment = run / "environment.json"
    colours = region_colours(config, splits)
    page = render(
        "run.html.j2",
        name=run.resolve().name,
        config=config,
        config_yaml=config_as_yaml(config),
        environment=environment.read_text() if environment.is_file() else None,
        best=best,
        best_dice=as_number(best.get("mean_dice")),
        splits=splits,
        regions=list(dict.fromkeys(region for split in splits for region in split.regions)),
        colours=colours,
        leaky=config.data.leaky_slice_split or any(split.summary.get("leaky_slice_split") for split in splits),
        curves=learning_curves(rows, int(best["step"]) if "step" in best else None, colours),
        validations=[row for row in rows if row["split"] == "val"],
        charts={split.name: _charts(split, colours) for split in splits},
        overlays=picture(overlays) if overlays.is_file() and not splits else None,
        patients=patients,
        no_patients=no_patients,
        strip=interval_strip,
    )
    return page, [
        f"{split.name} {region}: Dice {shown(scores['dice']['mean'])}{' (stale)' if split.stale else ''}"
        for split in splits
        for region, scores in split.regions.items()
    ]


def region_colours(config: Config, splits: Sequence[Split]) -> dict[str, int]:
    """A region's colour is that of its outlines in pictures; regions that were renamed since have the next ones."""
    found = {region: label - 1 for region, label in own_labels(config.region_labels).items()}
    for region in (region for split in splits for region in split.regions):
        found.setdefault(region, max(found.values(), default=-1) + 1)
    return found


def learning_curves(rows: Sequence[dict[str, Any]], best_step: int | None, colours: Mapping[str, int]) -> list[Markup]:
    """Loss, and Dice of each region in its colour, of training and validation over steps; none for no rows."""
    if not rows:
        return []
    marks = [Mark(best_step, f"best: step {best_step:,}")] if best_step is not None else []
    x = Axis("step", 0, max(row["step"] for row in rows))
    train, each = _thinned([row for row in rows if row["split"] == "train"])
    val = [row for row in rows if row["split"] == "val"]
    note = f"Training: means of {each} steps." if each > 1 else ""
    regions = list(rows[0]["dice"])
    losses = [
        Line("training", [(row["step"], _number(row["loss"])) for row in train], NEUTRAL, "faint"),
        Line("validation", [(row["step"], _number(row["loss"])) for row in val], NEUTRAL, markers=True),
    ]
    y = Axis.around("loss", [value for line in losses for _, value in line.points], from_zero=True)
    dice = []
    for region in regions:
        of_region = [(row["step"], _number(row["dice"][region])) for row in train]
        dice.append(Line(f"{region}, training", of_region, colours.get(region, NEUTRAL), "faint"))
    for region in regions:
        of_region = [(row["step"], _number(row["dice"].get(region))) for row in val]
        dice.append(Line(f"{region}, validation", of_region, colours.get(region, NEUTRAL), markers=True))
    return [
        line_chart("Loss", x, y, losses, marks, note),
        line_chart("Dice", x, Axis("Dice", 0, 1), dice, marks, note),
    ]


def _thinned(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """At most MOST_POINTS rows, each the mean of so many in a row, and that number."""
    each = -(-len(rows) // MOST_POINTS)
    if each <= 1:
        return list(rows), 1
    means = []
    for first in range(0, len(rows), each):
        some = rows[first : first + each]
        dice = {region: _mean([row["dice"][region] for row in some]) for region in some[0]["dice"]}
        means.append({"step": some[-1]["step"], "loss": _mean([row["loss"] for row in some]), "dice": dice})
    return means, each


def _charts(split: Split, colours: Mapping[str, int]) -> list[Markup]:
    known = [region for region in split.regions if split.counts(region) is not None]
    charts = [threshold_chart(split, region, colours[region]) for region in known]
    if known:
        charts.append(calibration_chart(split, colours))
    sizes = size_chart(split, colours)
    return [*charts, sizes] if sizes is not None else charts


def _patients(config: Config) -> tuple[list[Patients], str | None]:
    """Of each split, or why that cannot be said."""
    try:
        store = open_store(Path(config.data.store))
        found = [_patients_of(store, config, split) for split in ("train", "val")]
    except (DistsegError, OSError) as error:
        return [], f"The store cannot be read any more ({error})."
    try:
        found.append(_patients_of(store, config, "test"))
    except DistsegError:  # none was held out
        found.append(Patients("test", 0, 0, []))
    return found, None


def _patients_of(store: Store, config: Config, split: str) -> Patients:
    cases = [case for case, z in split_slices(config, store, split).by_case() if len(z)]
    names = sorted({case.patient for case in cases})
    return Patients(split, len(cases), len(names), names[:MOST_NAMES])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
