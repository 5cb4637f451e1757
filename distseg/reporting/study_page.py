"""The page about a study: encoders against decoders, how each run learned, what it costs, and what failed."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from distseg.reporting.charts import Axis, Dot, Line, Style, heat_map, line_chart, scatter
from distseg.reporting.page import as_number, render, shown
from distseg.studies.grid import Run, Study, load_study
from distseg.studies.results import (
    Cell,
    best_pairs,
    cells,
    encoders_and_decoders,
    result_row,
    runs_of_pair,
)
from distseg.studies.task import Task, task_of
from distseg.tables import read_rows

COLOURED_RUNS = 6  # each has a colour of its own up to here; beyond, each decoder has one

Pair = tuple[str, str]
"""encoder, decoder"""


@dataclass(frozen=True)
class PairRow:
    encoder: str
    decoder: str
    cells: Mapping[str, Cell]
    """of each region"""
    cost: Mapping[str, str]
    """parameters_m, gmacs, slices_per_s: of its first run that has them"""

    @property
    def pair(self) -> Pair:
        return self.encoder, self.decoder


@dataclass(frozen=True)
class StudySplit:
    name: str
    pairs: list[PairRow]
    best: Mapping[str, set[Pair]]
    """region -> the pairs with the highest mean, to the decimals that are shown"""
    charts: list[Markup]

    @property
    def title(self) -> str:
        return {"val": "Validation", "test": "Test"}[self.name]


@dataclass(frozen=True)
class RunRow:
    name: str
    values: Mapping[str, Any]
    """of results.csv"""
    report: str | None
    """its own page, relative to the study; None: there is none"""


def study_page(folder: Path) -> tuple[str, list[str]]:
    """The page, and a line a score.

    Raises:
        DistsegError: a study.yaml that this distseg cannot read.
    """
    study = load_study(folder / "study.yaml")
    # The folder may have been moved, or named otherwise where it was written.
    study = dataclasses.replace(study, settings=dataclasses.replace(study.settings, output_dir=str(folder)))
    runs = study.runs
    tasks = [_as_recorded(task_of(study, run)) for run in runs]
    rows = [_run_row(study, run, task) for run, task in zip(runs, tasks, strict=True)]
    splits = [_study_split(study, runs, tasks, rows, split) for split in study.settings.splits]
    page = render(
        "study.html.j2",
        name=folder.resolve().name,
        study=study,
        study_yaml=study.as_yaml(),
        rows=rows,
        failed=[row for row in rows if row.values["error"]],
        n_done=sum(row.values["status"] == "done" for row in rows),
        splits=splits,
        regions=list(study.base.regions),
        wanted=runs_of_pair(study),
        curves=[_curves(runs, tasks, region, splits[0].best[region]) for region in study.base.regions],
    )
    return page, [
        f"{split.name} {region}: best Dice {shown(row.cells[region].mean)}, {row.decoder} on {row.encoder}"
        for split in splits
        for region, best in split.best.items()
        for row in split.pairs
        if row.pair in best
    ]


def _as_recorded(task: Task) -> Task:
    """With the fingerprint that the run was done under: a later distseg knows more settings, which changes no record."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        state = json.loads((task.root / "logs" / f"{task.name}.json").read_text())
        return dataclasses.replace(task, fingerprint=state["fingerprint"])
    return task


def _run_row(study: Study, run: Run, task: Task) -> RunRow:
    report = f"runs/{run.name}/report.html"
    return RunRow(run.name, result_row(study, run, task), report if (study.root / report).is_file() else None)


def _study_split(
    study: Study, runs: Sequence[Run], tasks: Sequence[Task], rows: Sequence[RunRow], split: str
) -> StudySplit:
    found = {region: cells(study, runs, tasks, split, region) for region in study.base.regions}
    pairs = []
    for encoder, decoder in next(iter(found.values())):
        of_region = {region: of_pair[encoder, decoder] for region, of_pair in found.items()}
        pairs.append(PairRow(encoder, decoder, of_region, _cost(rows, encoder, decoder)))
    best = {region: best_pairs(study, of_pair) for region, of_pair in found.items()}
    encoders, decoders = encoders_and_decoders(runs)
    maps = [
        heat_map(
            f"Mean Dice, {region}",
            encoders,
            decoders,
            {pair: cell.mean for pair, cell in of_pair.items()},
            best[region],
            f"Colours from {region}'s lowest to its highest; the best is framed.",
        )
        for region, of_pair in found.items()
        if any(cell.n_runs for cell in of_pair.values())
    ]
    costs = [chart for region in found if (chart := _cost_chart(pairs, region, decoders)) is not None]
    return StudySplit(split, pairs, best, [*maps, *costs])


def _cost(rows: Sequence[RunRow], encoder: str, decoder: str) -> dict[str, str]:
    own = [row.values for row in rows if (row.values["encoder"], row.values["decoder"]) == (encoder, decoder)]
    keys = ("parameters_m", "gmacs", "slices_per_s")
    return {key: next((values[key] for values in own if values[key]), "") for key in keys}


def _cost_chart(pairs: Sequence[PairRow], region: str, decoders: Sequence[str]) -> Markup | None:
    """Dice against multiply-accumulates; pairs that no cheaper one equals are named. None where nothing is known."""
    known = [row for row in pairs if row.cost["gmacs"] and not math.isnan(row.cells[region].mean)]
    if not known:
        return None
    dots, highest = [], -1.0
    for row in sorted(known, key=lambda row: (float(row.cost["gmacs"]), -row.cells[region].mean)):
        cell = row.cells[region]
        ends = None if math.isnan(cell.ci95[0]) else cell.ci95
        named = row.encoder if cell.mean > highest else ""
        highest = max(highest, cell.mean)
        told = f"{row.decoder} on {row.encoder}"
        dots.append(Dot(told, float(row.cost["gmacs"]), cell.mean, row.decoder, ends, named))
    low = min(end for dot in dots for end in (dot.y, *(dot.interval or ())))
    high = max(end for dot in dots for end in (dot.y, *(dot.interval or ())))
    x = Axis.around("GMACs a slice", [dot.x for dot in dots], log=True)
    y = Axis.around("mean Dice", (low, high))
    note = "With 95% intervals. Named: pairs that no cheaper one equals."
    return scatter(f"Cost against Dice, {region}", x, y, dots, decoders, note)


def _curves(runs: Sequence[Run], tasks: Sequence[Task], region: str, best: set[Pair]) -> Markup:
    """Validation Dice over steps, a line a run; of many runs those of the best pairs stand out."""
    _, decoders = encoders_and_decoders(runs)
    few = len(runs) <= COLOURED_RUNS
    lines = []
    for number, (run, task) in enumerate(zip(runs, tasks, strict=True)):
        model = run.config.model
        strong = not few and (model.encoder, model.decoder) in best
        points = [(row["step"], as_number(row["dice"].get(region))) for row in _validations(task)]
        style: Style = "solid" if few or strong else "faint"
        colour = number if few else decoders.index(model.decoder)
        lines.append(Line(run.name, points, colour, style, markers=few and len(points) < 20, strong=strong))
    lines = sorted((line for line in lines if line.points), key=lambda line: line.strong)
    x = Axis("step", 0, max((line.points[-1][0] for line in lines), default=1))
    legend = None if few else [(decoder, index) for index, decoder in enumerate(decoders)]
    note = "" if few or not best else f"Thick: {', '.join(f'{d} on {e}' for e, d in sorted(best))}, the best."
    return line_chart(f"Learning, {region}", x, Axis("validation Dice", 0, 1), lines, note=note, legend=legend)


def _validations(task: Task) -> list[dict[str, Any]]:
    return [row for row in read_rows(task.run / "metrics.jsonl") if row["split"] == "val"]
