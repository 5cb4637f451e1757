"""Volumes through the served model: the cases of a split, each with its truth and its mask."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from distseg.config import Config
from distseg.data.file_kinds import is_segmentation
from distseg.data.nrrd import read_segments, segment_names
from distseg.data.store import Case, Slices, Store
from distseg.data.volume import Volume
from distseg.data.volume_files import read_label_map
from distseg.errors import DistsegError
from distseg.models.label_map import LabelMap
from distseg.regions import exclusive, regions_by_width, write_order
from distseg.scoring.postprocessing import RegionRule

Rules = Mapping[str, RegionRule]


class Segmenter(Protocol):
    """A HuSegmenter, eager or loaded from a file."""

    n_slices: int

    def __call__(
        self, hu_BCHW: torch.Tensor, pixel_mm_B2: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class SegmentedCase:
    """The slices of a case that count, with truth and mask."""

    case: Case
    z: np.ndarray
    """their numbers, ascending"""
    hu_ZYX: np.ndarray
    truth_ZYX: np.ndarray
    mask_ZYX: np.ndarray
    """uint8 labels"""
    probability_RZYX: np.ndarray | None = None
    """of each region; None where only masks are known"""


def inference_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_neighbours(hu_ZYX: np.ndarray, z_B: np.ndarray, n_slices: int) -> np.ndarray:
    """Slices between their neighbours, (B, n_slices, Y, X); beyond a volume's ends its last slices repeat."""
    around = np.arange(n_slices) - n_slices // 2
    return hu_ZYX[np.clip(z_B[:, None] + around, 0, len(hu_ZYX) - 1)]


@torch.inference_mode()
def segment_volume(
    segmenter: Segmenter,
    hu_ZYX: np.ndarray,
    device: torch.device,
    batch_size: int,
    progress: Callable[[int], object] | None = None,
    pixel_mm: tuple[float, float] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of a volume, slice by slice.

    Args:
        segmenter: on `device`.
        hu_ZYX: int16 HU.
        device: where to compute.
        batch_size: slices in one forward pass.
        progress: is told how many slices each pass has done.
        pixel_mm: of the slices, down and across, for segmenters with a `spacing_mm`; None: for all others.

    Returns:
        uint8 labels [Z, Y, X] and float32 probabilities [R, Z, Y, X].
    """
    masks, probabilities = [], []
    for start in range(0, len(hu_ZYX), batch_size):
        z_B = np.arange(start, min(start + batch_size, len(hu_ZYX)))
        hu_BCHW = torch.from_numpy(with_neighbours(hu_ZYX, z_B, segmenter.n_slices)).to(device)
        sizes = () if pixel_mm is None else (torch.tensor([pixel_mm] * len(z_B), dtype=torch.float32, device=device),)
        mask_B1HW, probability_BRHW = segmenter(hu_BCHW, *sizes)
        masks.append(mask_B1HW.squeeze(1).cpu().numpy())
        probabilities.append(probability_BRHW.cpu().numpy())
        if progress is not None:
            progress(len(z_B))
    return np.concatenate(masks), np.concatenate(probabilities).swapaxes(0, 1)


def segment_cases(
    segmenter: Segmenter, store: Store, slices: Slices, config: Config, device: torch.device, rules: Rules | None = None
) -> Iterator[SegmentedCase]:
    """Segments each case that the slices are of, whole and at its own resolution.

    Args:
        segmenter: on `device`.
        store, slices: what is segmented.
        config: its regions, and slices in one forward pass.
        device: where to compute.
        rules: of post-processing; None: the masks as the model gives them.
    """
    for case, z in slices.by_case():
        hu_ZYX, truth_ZYX = store.read_case(case)
        pixel_mm = case.pixel_size_mm if config.data.spacing_mm else None
        mask_ZYX, probability_RZYX = segment_volume(
            segmenter, hu_ZYX, device, config.evaluate.batch_size, pixel_mm=pixel_mm
        )
        if rules is not None:
            mask_ZYX = label_map(rules, probability_RZYX, config.region_labels)
        yield SegmentedCase(case, z, hu_ZYX[z], truth_ZYX[z], mask_ZYX[z], probability_RZYX[:, z])


def label_map(
    rules: Mapping[str, RegionRule], probability_RZYX: np.ndarray, regions: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """One uint8 label map [Z, Y, X], as the served model writes its regions.

    Args:
        rules: of each region.
        probability_RZYX: in the order of `regions`.
        regions: region -> its labels.
    """
    names, masks = list(regions), dict[str, np.ndarray]()
    found_RZYX = _found(rules, probability_RZYX, regions) if exclusive(regions) else None
    for name in regions_by_width(regions):
        region, outer = names.index(name), rules[name].inside
        within = [masks[outer]] if outer else []
        if found_RZYX is not None:
            within.append(found_RZYX[region])
        masks[name] = rules[name].mask(probability_RZYX[region], np.logical_and.reduce(within) if within else None)
    labels_ZYX = np.zeros(probability_RZYX.shape[1:], np.uint8)
    for index, written in write_order(regions):
        labels_ZYX[masks[names[index]]] = written
    return labels_ZYX


def _found(
    rules: Mapping[str, RegionRule], probability_RZYX: np.ndarray, regions: Mapping[str, Sequence[int]]
) -> np.ndarray:
    """Where each region is found and no other that excludes it is more probable, bool [R, Z, Y, X]."""
    label_map = LabelMap(regions, 0.0)
    label_map.thresholds = [rules[name].threshold for name in regions]
    slices = torch.from_numpy(probability_RZYX).split(1, dim=1)
    return torch.cat([label_map.found(one_R1YX.transpose(0, 1)) for one_R1YX in slices]).numpy().swapaxes(0, 1)


def read_masks(files: Mapping[str, Sequence[Path]], store: Store, slices: Slices) -> Iterator[SegmentedCase]:
    """Masks that something else made, of the store's labels, in any axis order.

    Args:
        files: of each case, by its id: one of its mask, or its slices as pictures.
        store, slices: what they are masks of.

    Raises:
        DistsegError: a mask of another shape or voxel size, or with a label that the store has not.
    """
    known = sorted(set(store.labels.values()))
    for case, z in slices.by_case():
        path = files[case.id][0]
        hu_ZYX, truth_ZYX = store.read_case(case)
        mask = _read_mask(files[case.id], store.labels)
        mask_ZYX = mask.values_ZYX
        if mask_ZYX.shape != truth_ZYX.shape:
            raise DistsegError(
                f"masks: got {path} of shape {mask_ZYX.shape}; case {case.id} has {truth_ZYX.shape} (slices, rows, columns); "
                "a mask must lie on its volume's grid"
            )
        if case.spacing_mm and mask.spacing_mm and not np.allclose(mask.spacing_mm, case.spacing_mm, rtol=0.01):
            raise DistsegError(
                f"masks: got {path} with voxels of {_as_mm(mask.spacing_mm)}; case {case.id} has {_as_mm(case.spacing_mm)}; a mask must "
                "lie on its volume's grid; write it with the volume's geometry"
            )
        if unknown := sorted(set(np.unique(mask_ZYX).tolist()) - set(known)):
            raise DistsegError(f"masks: got label {unknown[0]} in {path}; the store's are {known}; remap it")
        yield SegmentedCase(case, z, hu_ZYX[z], truth_ZYX[z], mask_ZYX[z].astype(np.uint8))


def _read_mask(files: Sequence[Path], labels: Mapping[str, int]) -> Volume:
    """A label map; a segmentation whose segments have names is one of the store's labels."""
    if not is_segmentation(files[0]) or not (names := segment_names(files[0])):
        return read_label_map(files)
    if unknown := [name for name in names.values() if name not in labels]:
        raise DistsegError(
            f"masks: got segment {unknown[0]!r} in {files[0]}; the store's labels are {', '.join(labels)}; rename it"
        )
    return read_segments(files[0], {number: labels[name] for number, name in names.items()})


def _as_mm(spacing_mm: Sequence[float]) -> str:
    return " x ".join(f"{side:.3g}" for side in spacing_mm) + " mm"
