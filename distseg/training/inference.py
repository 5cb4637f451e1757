"""Volumes through the served model, and the scores of a split's cases."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from distseg.config import Config
from distseg.data.store import Case, Slices, Store
from distseg.kernels import region_bits, region_targets
from distseg.metrics import confusion_counts, none_if_undefined, scores_from_counts


class Segmenter(Protocol):
    """A HuSegmenter, eager or loaded from a file."""

    n_slices: int

    def __call__(self, hu_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class ScoredCase:
    case: Case
    counts_R4: np.ndarray
    """tp, fp, fn, tn of each region, voxels"""
    hu_ZYX: np.ndarray
    truth_ZYX: np.ndarray
    mask_ZYX: np.ndarray


def inference_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def segment_volume(segmenter: Segmenter, hu_ZYX: np.ndarray, device: torch.device, batch_size: int) -> np.ndarray:
    """Labels of a volume, slice by slice.

    Args:
        segmenter: on `device`.
        hu_ZYX: int16 HU.
        device: where to compute.
        batch_size: slices in one forward pass.

    Returns:
        uint8 labels [Z, Y, X].
    """
    neighbours = segmenter.n_slices // 2
    around = np.arange(-neighbours, neighbours + 1)  # a volume's end slices repeat
    masks = []
    for start in range(0, len(hu_ZYX), batch_size):
        z_B1 = np.arange(start, min(start + batch_size, len(hu_ZYX)))[:, None]
        hu_BCHW = torch.from_numpy(hu_ZYX[np.clip(z_B1 + around, 0, len(hu_ZYX) - 1)]).to(device)
        masks.append(segmenter(hu_BCHW)[0].squeeze(1).cpu().numpy())
    return np.concatenate(masks)


def val_dice(segmenter: nn.Module, store: Store, config: Config, device: torch.device) -> dict[str, float]:
    """Dice of each region over all voxels of the validation split; NaN is None as JSON wants it."""
    slices = store.slices_of_split("val", config.data.fold, config.seed if config.data.leaky_slice_split else None)
    batch_size = config.evaluate.batch_size
    scored = score_cases(segmenter.to(device), store, slices, config.regions, device, batch_size)  # type: ignore[arg-type]
    counts_R4 = sum(case.counts_R4 for case in scored)
    rows = zip(config.regions, counts_R4, strict=True)  # type: ignore[arg-type]
    return {name: none_if_undefined(scores_from_counts(row)["dice"]) for name, row in rows}  # type: ignore[misc]


def score_cases(
    segmenter: Segmenter,
    store: Store,
    slices: Slices,
    regions: Mapping[str, Sequence[int]],
    device: torch.device,
    batch_size: int,
) -> Iterator[ScoredCase]:
    """Segments each case that the slices are of, at its own resolution, and counts their voxels against the labels."""
    bits = region_bits(regions)
    for case, z in slices.by_case():
        hu_ZYX, truth_ZYX = store.read_case(case)
        mask_ZYX = segment_volume(segmenter, hu_ZYX, device, batch_size)
        hu_ZYX, truth_ZYX, mask_ZYX = hu_ZYX[z], truth_ZYX[z], mask_ZYX[z]
        predicted, truth = (region_targets(torch.from_numpy(labels), bits) for labels in (mask_ZYX, truth_ZYX))
        yield ScoredCase(case, confusion_counts(predicted, truth).numpy(), hu_ZYX, truth_ZYX, mask_ZYX)
