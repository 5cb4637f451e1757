"""Pictures of slices: one palette that all eyes can tell apart, its legend, and titles that fit their slices."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from distseg.config_files import load_config
from distseg.pictures import LABEL_COLOURS, Overlay, colour_of_label, draw_overlays
from distseg.regions import own_labels, write_order
from tests.conftest import SMALL

APART, FROM_GREY = 22.0, 10.0  # CIELAB (CIE 1976); what is just noticed is about 2.3
# What a dichromat sees, in linear RGB: Machado, Oliveira and Fernandes 2009, severity 1; Viénot, Brettel and Mollon 1999.
SEEN = {
    "by all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "by the red-blind, Machado": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "by the green-blind, Machado": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "by the red-blind, Viénot": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    "by the green-blind, Viénot": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]],
}  # fmt: skip
LABELS = {"background": 0, "lung": 1, "infection": 2, "ground_glass": 3, "consolidation": 4, "pleural_effusion": 5}


def cielab(colours: Sequence[str], seen: Sequence[Sequence[float]]) -> np.ndarray:
    """L*, a*, b* (D65) of sRGB colours, as somebody sees them."""
    rgb = np.array([list(bytes.fromhex(colour[1:])) for colour in colours]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = np.clip(linear @ np.array(seen).T, 0, 1) @ to_xyz.T / to_xyz.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=-1)  # fmt: skip


@pytest.mark.parametrize("eyes", SEEN)
def test_any_two_of_twelve_colours_are_apart_and_none_is_grey(eyes: str) -> None:
    lab = cielab(LABEL_COLOURS, SEEN[eyes])
    pairs = {
        (LABEL_COLOURS[i], LABEL_COLOURS[j]): float(np.linalg.norm(lab[i] - lab[j]))
        for i, j in itertools.combinations(range(len(lab)), 2)
    }
    assert len(LABEL_COLOURS) >= 12 and min(pairs.values()) >= APART, min(pairs.items(), key=lambda pair: pair[1])
    assert np.hypot(lab[:, 1], lab[:, 2]).min() >= FROM_GREY


def test_cielab_is_that_of_others() -> None:
    color = pytest.importorskip("highdicom.color", reason="highdicom is missing: pip install 'distseg[dicom]'")
    theirs = [color.CIELabColor.from_rgb(*bytes.fromhex(colour[1:])).lab for colour in LABEL_COLOURS]
    np.testing.assert_allclose(cielab(LABEL_COLOURS, SEEN["by all"]), theirs, atol=0.3)


@pytest.mark.parametrize(
    "regions",
    [
        {"lung": (1, 2), "infection": (2,)},
        {"infection": (2,), "lung": (1, 2)},
        {"lung": (1, 2, 3, 4), "infection": (2, 3, 4), "ground_glass": (3,), "consolidation": (4,), "effusion": (5,)},
    ],
)
def test_a_region_has_the_colour_of_the_label_that_masks_have_there(regions: Mapping[str, Sequence[int]]) -> None:
    names = list(regions)
    assert own_labels(regions) == {names[index]: label for index, label in write_order(regions)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in place of the files that they would be saved as."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        FigureCanvasAgg(figure).draw()
        figures.append(figure)

    for module in ("distseg.pictures", "distseg.data.augmented"):
        monkeypatch.setattr(f"{module}.save_figure", keep)
    return figures


def legend_of(figure: Figure) -> dict[str, str]:
    """Label -> the colour beside it."""
    (legend,) = figure.legends
    swatches = zip(legend.get_texts(), legend.get_patches(), strict=True)
    return {text.get_text(): to_hex(patch.get_facecolor()) for text, patch in swatches}


def assert_texts_fit(figure: Figure) -> None:
    """Titles lie over their own slices, apart from each other, and all texts are within the picture."""
    titles = [axes.title.get_window_extent() for axes in figure.axes if axes.title.get_text()]
    for one, other in itertools.combinations(titles, 2):
        assert not one.overlaps(other)
    texts = [*figure.texts, *([figure._suptitle] if figure._suptitle else []), figure.legends[0]]
    for box in (*titles, *(text.get_window_extent() for text in texts)):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height


def test_overlays_of_five_regions_name_their_colours_and_wrap_their_titles(drawn: list[Figure]) -> None:
    label_YX = np.zeros((48, 64), np.uint8)
    for label in range(1, 6):
        label_YX[8 * label : 8 * label + 5, 10:40] = label
    counts = ", ".join(f"{name} 123456 px" for name in LABELS if name != "background")
    shown = Overlay(f"slice 123: {counts}", np.zeros((48, 64), np.int16), label_YX, np.roll(label_YX, 3, axis=1))
    for columns, n in ((3, 6), (3, 4), (2, 1)):
        draw_overlays([shown] * n, LABELS, Path("never.png"), columns, heading="a_name_without_a_blank" * 12)
        figure = drawn[-1]
        assert legend_of(figure) == {name: colour_of_label(n) for name, n in LABELS.items() if n > 0}
        assert figure.axes[0].title.get_text().count("\n") >= 1
        assert_texts_fit(figure)


def test_a_label_at_the_edge_and_one_of_a_single_pixel_are_outlined(drawn: list[Figure]) -> None:
    label_YX = np.zeros((32, 32), np.uint8)
    label_YX[:4, :5], label_YX[20, 31] = 1, 2
    hu_YX = np.zeros((32, 32), np.int16)
    draw_overlays([Overlay("a$b$", hu_YX, None, label_YX)], {"$x$": 1, "edge": 2}, Path("never.png"))
    outlines = {to_hex(lines.get_edgecolor()[0]): lines.get_paths() for lines in drawn[-1].axes[0].collections}
    assert list(outlines) == [colour_of_label(1), colour_of_label(2)]
    assert all(len(path.vertices) > 1 for paths in outlines.values() for path in paths)
    assert drawn[-1].axes[0].get_xlim() == (-0.5, 31.5), "outlines do not move the slice"


def test_the_preview_names_its_colours(store: Path, drawn: list[Figure], tmp_path: Path) -> None:
    from distseg.data.augmented import draw_preview

    config = load_config(None, [*SMALL, f"data.store={store}"])
    assert draw_preview(config, tmp_path / "never.png", n_slices=2, n_epochs=1) == 2
    assert legend_of(drawn[-1]) == {"lung": colour_of_label(1), "infection": colour_of_label(2)}
    assert_texts_fit(drawn[-1])


def test_each_label_is_saved_as_a_picture_that_is_whole(tmp_path: Path) -> None:
    from PIL import Image

    label_YX = np.kron(np.arange(1, 13, dtype=np.uint8).reshape(3, 4), np.ones((12, 12), np.uint8))
    labels: dict[str, Any] = {f"label {n}": n for n in range(1, 13)}
    draw_overlays([Overlay("all", np.zeros((36, 48), np.int16), None, label_YX)], labels, tmp_path / "all.png")
    with Image.open(tmp_path / "all.png") as picture:
        colours = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in picture.convert("RGB").getcolors(2**24)}
    assert set(LABEL_COLOURS) <= colours and [path.name for path in tmp_path.iterdir()] == ["all.png"]
