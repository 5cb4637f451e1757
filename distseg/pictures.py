"""Slices as pictures: outlines of labels in one palette, and overlays of truth and prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distseg.config import IGNORED_LABEL
from distseg.files import written_aside

LABEL_COLOURS = ("#4cc9f0", "#ff6b35", "#b5e48c", "#f15bb5")  # of label 1, 2, ...: apart for colour-blind eyes on grey
LUNG_WINDOW_HU = (-1250, 250)


@dataclass(frozen=True)
class Overlay:
    title: str
    hu_YX: np.ndarray
    truth_YX: np.ndarray | None
    mask_YX: np.ndarray


def save_figure(figure: Figure, path: Path) -> None:
    """As PNG; there under its name when it is whole."""
    FigureCanvasAgg(figure)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def colour_of_label(label: int) -> str:
    return LABEL_COLOURS[(label - 1) % len(LABEL_COLOURS)]


def draw_outlines(axes: Axes, label_YX: np.ndarray, style: str = "solid") -> None:
    """Outlines each label of a slice in its colour."""
    for label in np.setdiff1d(label_YX, (0, IGNORED_LABEL)):
        axes.contour(
            label_YX == label, levels=[0.5], colors=colour_of_label(int(label)), linestyles=style, linewidths=1
        )


def draw_overlays(
    overlays: Sequence[Overlay],
    labels: Mapping[str, int],
    path: Path,
    columns: int = 3,
    heading: str = "dashed: truth, solid: prediction",
) -> None:
    """Slices in the lung window; truth, where known, as dashed, prediction as solid outline, a colour a label.

    Args:
        labels: numbers of the labels by their names, for the legend.
        path: of the PNG.
        columns: slices side by side.
        heading: above them.
    """
    rows = -(-len(overlays) // columns)
    figure = Figure(figsize=(4 * columns, 4.3 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    for axes, overlay in zip(all_axes, overlays, strict=False):
        axes.imshow(overlay.hu_YX, cmap="gray", vmin=LUNG_WINDOW_HU[0], vmax=LUNG_WINDOW_HU[1])
        axes.set_title(overlay.title, fontsize=8, parse_math=False)  # a case may be called a$b$
        for label_YX, style in ((overlay.truth_YX, "dashed"), (overlay.mask_YX, "solid")):
            if label_YX is not None:
                draw_outlines(axes, label_YX, style)
    names = [Line2D([], [], color=colour_of_label(n), label=name) for name, n in labels.items() if n > 0]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.suptitle(heading, fontsize=9)
    save_figure(figure, path)
