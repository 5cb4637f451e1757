"""Pictures of a run: slices with the outlines of truth and prediction. Curves are in its report."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from distseg.bars import counted
from distseg.config import IGNORED_LABEL, Config
from distseg.data.nifti import read_nifti
from distseg.data.store import Store, read_slice, split_slices
from distseg.pictures import Overlay, draw_overlays
from distseg.runs.folder import RunFolder
from distseg.runs.trained import load_best
from distseg.scoring.cases import CaseScores
from distseg.scoring.segmenting import SegmentedCase, segment_cases

SLICES_SHOWN = 3  # of each rank

RankedSlice = tuple[float, int, str, int]
"""Dice, minus the wrong pixels, case, z"""


def draw_run(folder: RunFolder, config: Config, store: Store, device: torch.device) -> None:
    """figures/overlays.png, with the best weights on the validation split; nothing where there are none yet."""
    if not folder.best_weights.is_file():
        return
    _, segmenter = load_best(folder, config)
    slices = split_slices(config, store, "val").of_cases(range(2))
    segmented = segment_cases(segmenter.to(device), store, slices, config, device)
    seen = counted(segmented, "draw", len(slices.cases), "volume")
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
