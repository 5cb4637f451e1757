"""Distances between the surfaces of two masks of a volume: normalised surface Dice (NSD) and the 95th percentile Hausdorff
distance (HD95).

The surface of a mask is its voxels that have one outside it, or outside the volume, among their six neighbours. With d(p)
the distance from the centre of a predicted surface voxel to the nearest centre of a true one, and d(t) the other way:

    NSD at a tolerance = (#{d(p) <= tolerance} + #{d(t) <= tolerance}) / (#p + #t)
    HD95 = max(95th percentile of d(p), 95th percentile of d(t))

Sources: Nikolov et al. 2018, https://arxiv.org/abs/1809.04430 (NSD, here with voxels for surface elements, as MONAI has
it), and MONAI's `compute_hausdorff_distance(percentile=95)`.
"""

import math

import numpy as np
from scipy.ndimage import binary_erosion, find_objects
from scipy.spatial import KDTree

from distseg.scores import SURFACE_SCORES, TOLERANCES_MM


def surface_scores(
    predicted_ZYX: np.ndarray, truth_ZYX: np.ndarray, spacing_mm: tuple[float, float, float] | None
) -> dict[str, float]:
    """NSD in [0, 1] at 1 and 2 mm, and HD95 in mm.

    Where one mask is empty NSD is 0 and HD95 undefined (NaN); where both are, or without a spacing, all are NaN.

    Args:
        predicted_ZYX, truth_ZYX: bool.
        spacing_mm: z, y, x; None: the source does not say, and nothing is assumed.
    """
    scores = dict.fromkeys(SURFACE_SCORES, math.nan)
    empty = [not mask.any() for mask in (predicted_ZYX, truth_ZYX)]
    if spacing_mm is None or all(empty):
        return scores
    if any(empty):
        return scores | {f"nsd_{mm}mm": 0.0 for mm in TOLERANCES_MM}
    predicted_mm, truth_mm = (_surface_mm(mask, spacing_mm) for mask in (predicted_ZYX, truth_ZYX))
    d_p, d_t = KDTree(truth_mm).query(predicted_mm)[0], KDTree(predicted_mm).query(truth_mm)[0]
    for mm in TOLERANCES_MM:
        scores[f"nsd_{mm}mm"] = ((d_p <= mm).sum() + (d_t <= mm).sum()) / (len(d_p) + len(d_t))
    scores["hd95_mm"] = max(np.percentile(d_p, 95), np.percentile(d_t, 95))
    return {name: float(value) for name, value in scores.items()}


def _surface_mm(mask_ZYX: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Centres of the surface's voxels (n, 3), mm."""
    (box,) = find_objects(mask_ZYX.astype(np.uint8))
    inside = mask_ZYX[box]
    start = [side.start for side in box]
    return (np.argwhere(inside & ~binary_erosion(inside)) + start) * np.asarray(spacing_mm)
