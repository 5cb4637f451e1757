"""Pictures of a study: encoders against decoders, validation Dice over steps, and what a network costs against its Dice."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from distseg.pictures import save_figure
from distseg.studies.grid import Run, Study
from distseg.studies.results import Cell, best_pairs, cells, encoders_and_decoders, runs_of_pair
from distseg.studies.task import Task
from distseg.tables import read_rows

NARROW = 0.01  # Dice: no scale shows less than this
MARKERS = ("o", "s", "^", "D")  # of decoders


def draw_study(study: Study, runs: Sequence[Run], tasks: Sequence[Task]) -> None:
    """figures/: dice_<split>.png, curves.png and cost.png; what no run has a figure for is left out."""
    if not any(task.is_done() for task in tasks):
        return
    folder = study.root / "figures"
    for split in study.settings.splits:
        found = {region: cells(study, runs, tasks, split, region) for region in study.base.regions}
        draw_heat_maps(study, runs, found, folder / f"dice_{split}.png")
        if split == study.settings.split:
            costs = [(_pair(run), task.read_state().gmacs) for run, task in zip(runs, tasks, strict=True)]
            draw_costs(runs, found, {pair: cost for pair, cost in costs if cost}, folder / "cost.png", split)
    draw_learning_curves(study, runs, tasks, folder / "curves.png")


def draw_heat_maps(
    study: Study, runs: Sequence[Run], cells_of_region: dict[str, dict[tuple, Cell]], path: Path
) -> None:
    """A map a region, each with its own range of colours; the figure in a cell, the best one framed."""
    encoders, decoders = encoders_and_decoders(runs)
    width, height = 1.9 + 1.3 * len(decoders), 1.1 + 0.5 * len(encoders)
    figure = Figure(figsize=(width * len(cells_of_region), height + 0.3), layout="constrained")
    all_axes = figure.subplots(1, len(cells_of_region), squeeze=False)[0]
    for axes, (region, found) in zip(all_axes, cells_of_region.items(), strict=True):
        values = np.array([[found[encoder, decoder].mean for decoder in decoders] for encoder in encoders])
        defined = values[~np.isnan(values)]
        low, high = (float(defined.min()), float(defined.max())) if len(defined) else (0.0, 1.0)
        high = max(high, low + NARROW)
        shown = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", aspect="auto", vmin=low, vmax=high)
        axes.set_facecolor("#dddddd")  # of cells without a figure
        for (row, column), value in np.ndenumerate(values):
            cell = found[encoders[row], decoders[column]]
            text = "-" if math.isnan(value) else f"{value:.3f}"
            if 0 < cell.n_runs < runs_of_pair(study):
                text += f"\n{cell.n_runs} of {runs_of_pair(study)} runs"
            dark = not math.isnan(value) and value < (low + high) / 2
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
        for encoder, decoder in best_pairs(study, found):
            row, column = encoders.index(encoder), decoders.index(decoder)
            frame = Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="#ff6b35", linewidth=2.5)
            axes.add_patch(frame)
        axes.set_xticks(range(len(decoders)), decoders, fontsize=8)
        axes.set_yticks(range(len(encoders)), encoders, fontsize=8)
        axes.set_title(f"{region}: mean Dice", fontsize=9)
        figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    save_figure(figure, path)


def draw_learning_curves(study: Study, runs: Sequence[Run], tasks: Sequence[Task], path: Path) -> None:
    """Dice of all validation pixels over steps, the mean of folds and seeds: a row a region, a column a decoder."""
    encoders, decoders = encoders_and_decoders(runs)
    regions = list(study.base.regions)
    figure = Figure(figsize=(3.4 * len(decoders) + 1.8, 2.7 * len(regions)), layout="constrained")
    all_axes = figure.subplots(len(regions), len(decoders), squeeze=False, sharex=True, sharey=True)
    of_pair: dict[tuple, list[list[dict]]] = {}
    for run, task in zip(runs, tasks, strict=True):
        rows = [row for row in read_rows(task.run / "metrics.jsonl") if row["split"] == "val"]
        if rows:
            of_pair.setdefault(_pair(run), []).append(rows)
    for (encoder, decoder), logs in of_pair.items():
        for row, region in enumerate(regions):
            steps, values = _mean_curve(logs, region)
            style = {"color": _colour(encoder, encoders), "marker": "." if len(steps) < 20 else ""}
            all_axes[row, decoders.index(decoder)].plot(steps, values, linewidth=1.2, **style)
    for (row, column), axes in np.ndenumerate(all_axes):
        axes.set(ylim=(0, 1), ylabel="" if column else f"{regions[row]}: validation Dice")
        axes.set(xlabel="step" if row == len(regions) - 1 else "")
        axes.set_title("" if row else decoders[column], fontsize=9)
        axes.grid(alpha=0.3)
    figure.legend(handles=_encoder_handles(encoders), loc="outside right center", fontsize=8, frameon=False)
    save_figure(figure, path)


def _mean_curve(logs: Sequence[list[dict]], region: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and Dice of the first, second, ... validation, up to where all runs are."""
    length = min(map(len, logs))
    steps = np.array([[row["step"] for row in rows[:length]] for rows in logs])
    values = np.array([[row["dice"][region] for row in rows[:length]] for rows in logs], dtype=float)  # None: NaN
    defined = (~np.isnan(values)).sum(axis=0)
    return steps.mean(axis=0), np.where(defined > 0, np.nansum(values, axis=0) / np.maximum(defined, 1), np.nan)


def draw_costs(
    runs: Sequence[Run],
    cells_of_region: dict[str, dict[tuple, Cell]],
    gmacs: dict[tuple, float],
    path: Path,
    split: str,
) -> None:
    """Mean Dice with its 95% interval against GMACs of a slice, a panel a region."""
    figure = Figure(figsize=(4.6 * len(cells_of_region) + 2.2, 3.8), layout="constrained")
    all_axes = figure.subplots(1, len(cells_of_region), squeeze=False)[0]
    encoders, decoders = encoders_and_decoders(runs)
    for axes, (region, found) in zip(all_axes, cells_of_region.items(), strict=True):
        for pair, cell in found.items():
            if pair not in gmacs or math.isnan(cell.mean):
                continue
            low, high = (cell.mean if math.isnan(end) else end for end in cell.ci95)
            marker = MARKERS[decoders.index(pair[1]) % len(MARKERS)]
            axes.errorbar(
                gmacs[pair], cell.mean, yerr=[[cell.mean - low], [high - cell.mean]], color=_colour(pair[0], encoders),
                marker=marker, markersize=6, elinewidth=0.8, capsize=2,
            )  # fmt: skip
        axes.set(xlabel="GMACs a slice", ylabel=f"mean Dice, {split}")
        _log_ticks(axes, list(gmacs.values()))
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -NARROW), min(max(high, low + NARROW), 1 + NARROW))
        axes.set_title(region, fontsize=9)
        axes.grid(alpha=0.3)
    handles = _encoder_handles(encoders)
    for index, decoder in enumerate(decoders):
        marker = MARKERS[index % len(MARKERS)]
        handles.append(Line2D([], [], color="#444444", linestyle="", marker=marker, label=decoder))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    save_figure(figure, path)


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5 x 10^n: the default labels none between 20 and 80."""
    if not values:
        return
    low, high = min(values) / 1.3, max(values) * 1.3
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [tick for n in exponents for tick in (10.0**n, 2 * 10.0**n, 5 * 10.0**n) if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _pair(run: Run) -> tuple:
    return (run.config.model.encoder, run.config.model.decoder)


def _encoder_handles(encoders: Sequence[str]) -> list[Line2D]:
    return [Line2D([], [], color=_colour(name, encoders), linewidth=4, label=name) for name in encoders]


def _colour(encoder: str, encoders: Sequence[str]) -> tuple[float, float, float, float]:
    place = encoders.index(encoder)
    return colormaps["tab10"](place) if len(encoders) <= 10 else colormaps["turbo"](place / (len(encoders) - 1))
