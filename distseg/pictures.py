"""Slices as pictures: outlines of labels in one palette with its legend, and overlays of truth and prediction."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distseg.config import IGNORED_LABEL
from distseg.files import written_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of label 1, 2, ..., in every picture, page and DICOM-SEG. The first two are as before; the others were searched for so that the
# smallest CIELAB distance of any two is as large as can be, for all eyes, red-blind and green-blind ones (22.9; of the first
# three 41); each is at least 10 from any grey of a CT, and bright ones come first. tests/test_pictures.py measures it.
LABEL_COLOURS = (
    "#4cc9f0", "#ff6b35", "#77eebb", "#ee44aa", "#eedd11", "#0099ff",
    "#8833ff", "#cc2266", "#ee8877", "#aaee77", "#bb11bb", "#bb4433",
)  # fmt: skip
CASING = "#101010"  # around each outline, so that every colour stands out from light and from dark grey
LUNG_WINDOW_HU = (-1250, 250)
PANEL_IN = 4.0  # width of a slice in an overlay
TITLE_IN = 0.95 * PANEL_IN
CHARACTER_EM, LINE_EM = 0.62, 1.3  # mean width of a character, and height of a line, in matplotlib's own font


@dataclass(frozen=True)
class Overlay:
    title: str
    hu_YX: np.ndarray
    truth_YX: np.ndarray | None
    mask_YX: np.ndarray


def colour_of_label(label: int) -> str:
    """Of label 1, 2, ...; the thirteenth has the first one's again."""
    return LABEL_COLOURS[(label - 1) % len(LABEL_COLOURS)]


def save_figure(figure: "Figure", path: Path) -> None:
    """As PNG; there under its name when it is whole."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here and below: few commands draw, and it is slow

    FigureCanvasAgg(figure)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def draw_slice(axes: "Axes", image: np.ndarray, title: str, width_in: float, font_size: float, **shown: Any) -> None:
    """A slice without axes, its title wrapped to its width.

    Args:
        axes: to draw in.
        image: grey (Y, X), or red, green and blue (Y, X, 3).
        title: above it.
        width_in: of the axes, inches.
        font_size: of the title, points.
        shown: further words for `imshow`.
    """
    axes.set_axis_off()
    axes.imshow(image, cmap="gray", **shown)
    axes.set_autoscale_on(False)
    axes.set_title(wrapped(title, width_in, font_size), fontsize=font_size, parse_math=False)  # a case may be a$b$


def draw_outlines(axes: "Axes", label_YX: np.ndarray, style: str = "solid") -> None:
    """Outlines each label of a slice in its colour."""
    from matplotlib.patheffects import Normal, Stroke

    for label in np.setdiff1d(label_YX, (0, IGNORED_LABEL)):
        inside_YX = label_YX == label
        y, x = (_around(inside_YX.any(axis=axis)) for axis in (1, 0))  # contours of whole slices take seconds
        if min(len(y), len(x)) < 2:
            continue
        lines = axes.contour(
            x, y, inside_YX[y[0] : y[-1] + 1, x[0] : x[-1] + 1], levels=[0.5],
            colors=colour_of_label(int(label)), linestyles=style, linewidths=1.1,
        )  # fmt: skip
        lines.set_path_effects([Stroke(linewidth=2.3, foreground=CASING, alpha=0.7), Normal()])


def _around(any_inside: np.ndarray) -> np.ndarray:
    """Places from the one before the first that is inside to the one after the last, where there are such."""
    places = np.flatnonzero(any_inside)
    return np.arange(max(places[0] - 1, 0), min(places[-1] + 2, len(any_inside)))


def draw_legend(figure: "Figure", labels: Mapping[str, int], width_in: float, font_size: float = 8) -> None:
    """Names the labels beside their colours, below everything, in as many lines as the width asks for.

    Args:
        figure: to add it to.
        labels: numbers of the labels by their names.
        width_in: of the figure, inches.
        font_size: points.
    """
    from matplotlib.patches import Patch

    named = {name: n for name, n in labels.items() if n not in (0, IGNORED_LABEL)}
    if not named:
        return
    swatches = [
        Patch(facecolor=colour_of_label(n), edgecolor=CASING, linewidth=0.6, label=name) for name, n in named.items()
    ]
    longest = max(map(len, named)) + 6  # a swatch and the gap are as wide as so many characters
    lines = -(-len(named) // max(1, _characters(width_in, font_size) // longest))
    columns = -(-len(named) // lines)  # as many in each line
    # A label may be called a$b$.
    for text in figure.legend(handles=swatches, loc="outside lower center", ncols=columns, fontsize=font_size).texts:
        text.set_parse_math(False)


def wrapped(text: str, width_in: float, font_size: float) -> str:
    """A text in lines of such a width, also where it has no blanks."""
    text = os.fsencode(text).decode("utf-8", "replace")  # a file's name may be of any bytes
    return textwrap.fill(text, _characters(width_in, font_size), break_on_hyphens=False)


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
    from matplotlib.figure import Figure

    columns = min(columns, len(overlays))
    rows, width_in = -(-len(overlays) // columns), PANEL_IN * columns
    lines = max(wrapped(overlay.title, TITLE_IN, 8).count("\n") for overlay in overlays) + 1
    height_in = rows * (PANEL_IN + lines * LINE_EM * 8 / 72) + 0.6  # heading and legend
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes[len(overlays) :]:
        axes.set_axis_off()
    for axes, overlay in zip(all_axes, overlays, strict=False):
        low, high = LUNG_WINDOW_HU
        draw_slice(axes, overlay.hu_YX, overlay.title, TITLE_IN, 8, vmin=low, vmax=high)
        for label_YX, style in ((overlay.truth_YX, "dashed"), (overlay.mask_YX, "solid")):
            if label_YX is not None:
                draw_outlines(axes, label_YX, style)
    draw_legend(figure, labels, width_in)
    figure.suptitle(wrapped(heading, width_in, 9), fontsize=9, parse_math=False)
    save_figure(figure, path)


def _characters(width_in: float, font_size: float) -> int:
    """How many of them are as wide."""
    return max(8, int(width_in * 72 / (font_size * CHARACTER_EM)))
