"""Pictures of a run: learning curves, and slices with the outlines of truth and prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from distseg.config import IGNORED_LABEL, Config
from distseg.data.nifti import read_nifti
from distseg.data.store import Store, read_slice, split_slices
from distseg.pictures import LABEL_COLOURS, Overlay, draw_overlays, save_figure
from distseg.runs.folder import RunFolder
from distseg.runs.trained import load_best
from distseg.scoring.cases import CaseScores
from distseg.scoring.segmenting import SegmentedCase, segment_cases
from distseg.tables import read_rows

SLICES_SHOWN = 3  # of each rank

RankedSlice = tuple[float, int, str, int]
"""Dice, minus the wrong pixels, case, z"""


def draw_run(folder: RunFolder, config: Config, store: Store, device: torch.device) -> None:
    """figures/curves.png and, with the best weights on the validation split, figures/overlays.png."""
    draw_curves(read_rows(folder.metrics), folder.figures / "curves.png")
    if not folder.best_weights.is_file():
        return
    _, segmenter = load_best(folder, config)
    slices = split_slices(config, store, "val").of_cases(range(2))
    segmented = segment_cases(segmenter.to(device), store, slices, config, device)
    seen = tqdm(segmented, "draw", total=len(slices.cases), unit="volume")
    overlays = [overlay for case in seen for overlay in telling_slices(case)]
    draw_overlays(overlays, store.labels, folder.figures / "overlays.png")


def telling_slices(segmented: SegmentedCase) -> list[Overlay]:
    """The slices of a case with most disease, with most error, and in its middle."""
    truth_ZYX, mask_ZYX = np.where(segmented.truth_ZYX == IGNORED_LABEL, 0, segmented.truth_ZYX), segmented.mask_ZYX
    disease = (truth_ZYX == truth_ZYX.max()).sum(axis=(1, 2))
    error = (truth_ZYX != mask_ZYX).sum(axis=(1, 2))
    chosen = {int(disease.argmax()): "most disease", int(error.argmax()): "most error", len(error) // 2: "middle"}
    return [
        Overlay(f"{segmented.case.id}, slice {z}: {why}", segmented.hu_ZYX[z], truth_ZYX[z], mask_ZYX[z])
        for z, why in chosen.items()
    ]


def draw_ranked_slices(folder: Path, store: Store, regions: Sequence[str], scored: Sequence[CaseScores]) -> None:
    """figures/<region>_<worst|median|best>.png of an evaluation whose masks/ are written: three slices each, by Dice."""
    shown: dict[str, list[RankedSlice]] = {}
    for index, region in enumerate(regions):
        ranked = _ranked_slices(scored, index)
        middle = max(0, (len(ranked) - SLICES_SHOWN) // 2)
        shown[f"{region}_worst"] = ranked[:SLICES_SHOWN]
        shown[f"{region}_median"] = ranked[middle:][:SLICES_SHOWN]
        shown[f"{region}_best"] = ranked[-SLICES_SHOWN:]
    masks = _masks_of_slices(folder, {(case, z) for slices in shown.values() for _, _, case, z in slices})
    cases = {case.id: case for case in store.cases}
    for name, slices in shown.items():
        overlays = []
        for dice, _, case, z in slices:
            files = store.slices_of([cases[case]])[z]
            images = read_slice(files.image), read_slice(files.label), masks[case, z]
            overlays.append(Overlay(f"{case}, slice {z}: Dice {dice:.3f}", *images))
        if overlays:
            draw_overlays(overlays, store.labels, folder / "figures" / f"{name}.png")


def _masks_of_slices(folder: Path, wanted: set[tuple[str, int]]) -> dict[tuple[str, int], np.ndarray]:
    """(case, z) -> its mask; each file is read once, and not kept."""
    masks: dict[tuple[str, int], np.ndarray] = {}
    for case in {case for case, _ in wanted}:
        mask_ZYX = read_nifti(folder / "masks" / f"{case}.nii.gz").values_ZYX
        masks |= {(case, z): mask_ZYX[z].copy() for name, z in wanted if name == case}
    return masks


def _ranked_slices(scored: Sequence[CaseScores], index: int) -> list[RankedSlice]:
    """Worst first; slices that are empty in truth and prediction have no Dice."""
    rows = [
        (case.case, z, *counts)
        for case in scored
        for z, counts in zip(case.z.tolist(), case.counts_ZR4[:, index].tolist(), strict=True)
    ]
    return sorted((2 * tp / (2 * tp + fp + fn), -fp - fn, case, z) for case, z, tp, fp, fn, _ in rows if tp + fp + fn)


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss over steps, Dice over steps, train and validation; nothing for no rows."""
    if not rows:
        return
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, dice = figure.subplots(1, 2)
    for split, style in (("train", {"alpha": 0.6, "linewidth": 1}), ("val", {"marker": "o", "markersize": 3})):
        of_split = [row for row in rows if row["split"] == split]
        steps = [row["step"] for row in of_split]
        loss.plot(steps, [row["loss"] for row in of_split], label=split, **style)
        for index, name in enumerate(rows[0]["dice"]):
            values = [row["dice"][name] for row in of_split]
            colour = LABEL_COLOURS[index % len(LABEL_COLOURS)]
            dice.plot(
                steps, [np.nan if v is None else v for v in values], color=colour, label=f"{name} {split}", **style
            )
    loss.set(xlabel="step", ylabel="loss", ylim=(0, None))
    dice.set(xlabel="step", ylabel="Dice", ylim=(0, 1))
    for axes in (loss, dice):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
