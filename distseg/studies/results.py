"""What the runs of a study have come to: results.csv with a row each, table.md with encoders against decoders."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distseg.config_files import load_config
from distseg.files import write_text
from distseg.metrics import mean_defined, patient_bootstrap_ci
from distseg.studies.grid import Run, Study
from distseg.studies.task import Task
from distseg.tables import read_csv, read_rows, write_csv


@dataclass(frozen=True)
class Cell:
    """An encoder with a decoder: the volumes of all its folds and seeds together."""

    mean: float
    """Dice; NaN without a run"""
    ci95: tuple[float, float]
    """patient bootstrap; NaN for fewer than two patients"""
    n_runs: int
    """scored, of those that the study asks for"""


def write_tables(study: Study, runs: Sequence[Run], tasks: Sequence[Task]) -> None:
    """results.csv and table.md, from what the runs have left so far."""
    rows = [result_row(study, run, task) for run, task in zip(runs, tasks, strict=True)]
    write_csv(study.root / "results.csv", rows)
    write_text(study.root / "table.md", table_as_markdown(study, runs, tasks))


def result_row(study: Study, run: Run, task: Task) -> dict[str, Any]:
    """A row of results.csv; what a run does not have (yet) is empty."""
    state = task.read_state()
    model = run.config.model
    row: dict[str, Any] = {"encoder": model.encoder, "decoder": model.decoder, "fold": run.config.data.fold}
    row |= {"seed": run.config.seed, "status": task.status()}
    for split in study.settings.splits:
        regions = read_summary(task, split).get("regions", {}) if split in state.scored else {}
        for region in study.base.regions:
            row |= {f"{split}_{region}_{key}": value for key, value in _scores(regions.get(region)).items()}
    row |= {"parameters_m": _text(state.parameters_m, 3), "gmacs": _text(state.gmacs, 3)}
    seconds, speed = training_pace(task) if state.trained else (None, None)
    return row | {"training_s": _text(seconds, 1), "slices_per_s": _text(speed, 2), "error": state.error or ""}


def training_pace(task: Task) -> tuple[float | None, float | None]:
    """Seconds of all steps (each counted once, however often it was done; validation is not among them), slices/s."""
    config = json.loads((task.run / "environment.json").read_text())
    rows = [row for row in read_rows(task.run / "metrics.jsonl") if row["split"] == "train"]
    batch = _batch_of_rank(task) * config["world_size"]
    seconds = sum(batch / row["slices_per_s"] for row in rows)
    return (seconds, batch * len(rows) / seconds) if seconds else (None, None)


def cells(study: Study, runs: Sequence[Run], tasks: Sequence[Task], split: str, region: str) -> dict[tuple, Cell]:
    """(encoder, decoder) -> what its runs have scored in a region."""
    found: dict[tuple, list[Task]] = {}
    for run, task in zip(runs, tasks, strict=True):
        found.setdefault((run.config.model.encoder, run.config.model.decoder), []).append(task)
    return {pair: _cell(study, of_pair, split, region) for pair, of_pair in found.items()}


def best_pairs(study: Study, cells_of_pair: dict[tuple, Cell]) -> set[tuple]:
    """The highest mean, to three decimals, among the pairs all of whose runs are scored: others saw other patients."""
    whole = {pair: cell for pair, cell in cells_of_pair.items() if cell.n_runs == runs_of_pair(study)}
    shown = {pair: f"{cell.mean:.3f}" for pair, cell in whole.items() if not math.isnan(cell.mean)}
    return {pair for pair, text in shown.items() if text == max(shown.values())}


def runs_of_pair(study: Study) -> int:
    return len(study.settings.folds) * len(study.settings.seeds)


def table_as_markdown(study: Study, runs: Sequence[Run], tasks: Sequence[Task]) -> str:
    base, settings = study.base, study.settings
    lines = [
        f"# Study {study.root.absolute().name}",
        "",
        f"{base.optim.name} at {base.optim.lr:g}, "
        + (f"{base.train.max_steps} steps" if base.train.max_steps else f"{base.train.epochs} epochs")
        + f", batch {base.train.batch_size_per_rank} a rank, {settings.processes_per_run} rank(s), "
        f"{base.data.image_size} x {base.data.image_size} pixels, BCE x {base.loss.bce_weight:g} + Dice x "
        f"{base.loss.dice_weight:g}; folds {_listed(settings.folds)}; seeds {_listed(settings.seeds)}.",
        "",
        "Mean Dice of the volumes of all folds and seeds, with the 95% interval of a bootstrap over patients. Bold is the",
        "highest mean; where intervals overlap much, the order may be chance.",
    ]
    for split in settings.splits:
        for region in base.regions:
            lines += ["", f"## {region}, {split}", "", *_block(study, runs, tasks, split, region)]
    lines += ["", "## Cost", "", *_costs(study, runs, tasks), ""]
    return "\n".join(lines)


def dice_in_words(task: Task, split: str) -> str:
    """`lung Dice 0.969, infection Dice 0.588`."""
    regions = read_summary(task, split)["regions"]
    return ", ".join(f"{name} Dice {_text(scores['dice']['mean'], 4) or '-'}" for name, scores in regions.items())


def read_summary(task: Task, split: str) -> dict[str, Any]:
    return json.loads((task.run / "eval" / split / "summary.json").read_text())


def encoders_and_decoders(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    models = [run.config.model for run in runs]
    return list(dict.fromkeys(m.encoder for m in models)), list(dict.fromkeys(m.decoder for m in models))


def _cell(study: Study, tasks: Sequence[Task], split: str, region: str) -> Cell:
    scored = [task for task in tasks if task.is_done()]
    rows = [row for task in scored for row in read_csv(task.run / "eval" / split / "per_case.csv")]
    values = [float(row[f"{region}_dice"] or "nan") for row in rows]
    patients = [row["patient"] for row in rows]
    interval = patient_bootstrap_ci(values, patients, study.base.evaluate.bootstrap_resamples, study.base.seed)
    return Cell(mean_defined(values), interval, len(scored))


def _block(study: Study, runs: Sequence[Run], tasks: Sequence[Task], split: str, region: str) -> list[str]:
    found = cells(study, runs, tasks, split, region)
    best, wanted = best_pairs(study, found), runs_of_pair(study)

    def text(pair: tuple) -> str:
        cell = found[pair]
        if not cell.n_runs:
            return "-"
        mean = "undefined" if math.isnan(cell.mean) else f"{cell.mean:.3f}"
        mean = f"**{mean}**" if pair in best else mean
        interval = "" if math.isnan(cell.ci95[0]) else f" ({cell.ci95[0]:.3f} to {cell.ci95[1]:.3f})"
        return mean + interval + ("" if cell.n_runs == wanted else f", {cell.n_runs} of {wanted} runs")

    encoders, decoders = encoders_and_decoders(runs)
    return _grid(decoders, {encoder: [text((encoder, decoder)) for decoder in decoders] for encoder in encoders})


def _costs(study: Study, runs: Sequence[Run], tasks: Sequence[Task]) -> list[str]:
    """Of each pair: parameters and the multiply-accumulates of a slice."""
    costs: dict[tuple, str] = {}
    for run, task in zip(runs, tasks, strict=True):
        state = task.read_state()
        if state.gmacs is not None:
            text = f"{state.parameters_m:.1f} M parameters, {state.gmacs:.1f} GMACs"
            costs[run.config.model.encoder, run.config.model.decoder] = text
    encoders, decoders = encoders_and_decoders(runs)
    return _grid(decoders, {encoder: [costs.get((encoder, d), "-") for d in decoders] for encoder in encoders})


def _grid(header: Sequence[str], rows: dict[str, list[str]]) -> list[str]:
    lines = [["encoder", *header], ["---"] * (len(header) + 1), *([name, *row] for name, row in rows.items())]
    return [f"| {' | '.join(line)} |" for line in lines]


def _scores(scores: dict[str, Any] | None) -> dict[str, Any]:
    if scores is None:
        return dict.fromkeys(("dice", "ci_low", "ci_high", "pooled", "n"), "")
    low, high = scores["dice"]["ci95"] or (None, None)
    figures = {"dice": scores["dice"]["mean"], "ci_low": low, "ci_high": high, "pooled": scores["pooled"]["dice"]}
    return {key: _text(value, 6) for key, value in figures.items()} | {"n": scores["dice"]["n"]}


def _batch_of_rank(task: Task) -> int:
    train = load_config(task.run / "config.yaml").train
    return train.batch_size_per_rank * train.gradient_accumulation_steps


def _text(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
