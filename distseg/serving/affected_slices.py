"""The picture of a predicted volume: its most affected slices, outlined."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from distseg.pictures import Overlay, draw_overlays
from distseg.regions import regions_by_width

SLICES_SHOWN = 6  # of an overlay


def draw_affected_slices(
    path: Path,
    hu_ZYX: np.ndarray,
    mask_ZYX: np.ndarray,
    regions: Mapping[str, Sequence[int]],
    labels: Mapping[str, int],
    heading: str,
) -> None:
    """Writes the picture.

    Args:
        path: of the PNG.
        hu_ZYX, mask_ZYX: the volume and its labels.
        regions: region -> its labels.
        labels: numbers of the labels by their names.
        heading: above the slices.
    """
    draw_overlays(most_affected_slices(hu_ZYX, mask_ZYX, regions), labels, path, heading=heading)


def most_affected_slices(
    hu_ZYX: np.ndarray, mask_ZYX: np.ndarray, regions: Mapping[str, Sequence[int]]
) -> list[Overlay]:
    """The slices with most of the narrowest region, then of the next wider ones, from the lowest up."""
    by_width = regions_by_width(regions)
    areas = [np.isin(mask_ZYX, list(regions[name])).sum(axis=(1, 2)) for name in by_width]  # lexsort: last key first
    chosen = sorted(np.lexsort(areas)[-SLICES_SHOWN:].tolist())
    counts = [", ".join(f"{name} {area[z]} px" for name, area in zip(by_width, areas, strict=True)) for z in chosen]
    return [
        Overlay(f"slice {z}: {count}", hu_ZYX[z], None, mask_ZYX[z]) for z, count in zip(chosen, counts, strict=True)
    ]
