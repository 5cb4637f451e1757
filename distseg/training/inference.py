"""Volumes through the served model, and the scores of a split's cases."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from distseg.data.store import Case, Store
from distseg.kernels import region_bits, region_targets
from distseg.metrics import confusion_counts

Segmenter = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # HuSegmenter, eager or loaded from a file


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
    masks = []
    for start in range(0, len(hu_ZYX), batch_size):
        hu_B1HW = torch.from_numpy(hu_ZYX[start : start + batch_size]).unsqueeze(1).to(device)
        masks.append(segmenter(hu_B1HW)[0].squeeze(1).cpu().numpy())
    return np.concatenate(masks)


def score_cases(
    segmenter: Segmenter,
    store: Store,
    cases: Sequence[Case],
    regions: Mapping[str, Sequence[int]],
    device: torch.device,
    batch_size: int,
) -> Iterator[ScoredCase]:
    """Segments each case at its own resolution and counts voxels against its labels."""
    bits = region_bits(regions)
    for case in cases:
        hu_ZYX, truth_ZYX = store.read_case(case)
        mask_ZYX = segment_volume(segmenter, hu_ZYX, device, batch_size)
        predicted, truth = (region_targets(torch.from_numpy(labels), bits) for labels in (mask_ZYX, truth_ZYX))
        yield ScoredCase(case, confusion_counts(predicted, truth).numpy(), hu_ZYX, truth_ZYX, mask_ZYX)
