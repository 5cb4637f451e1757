"""Surface scores by hand, and against MONAI."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from distseg.metrics import scores_from_counts
from distseg.scoring.surfaces import surface_scores


def box(z: slice, y: slice, x: slice) -> np.ndarray:
    mask = np.zeros((8, 16, 16), bool)
    mask[z, y, x] = True
    return mask


def test_a_shift_along_an_axis_is_measured_in_that_axis_spacing() -> None:
    one = box(slice(2, 3), slice(4, 5), slice(4, 5))
    other = box(slice(2, 3), slice(4, 5), slice(7, 8))
    assert surface_scores(one, other, (5.0, 1.0, 0.5)) == {"nsd_1mm": 0.0, "nsd_2mm": 1.0, "hd95_mm": 1.5}
    assert surface_scores(one, other, (5.0, 1.0, 0.7))["hd95_mm"] == pytest.approx(2.1)
    above = box(slice(3, 4), slice(4, 5), slice(4, 5))
    assert surface_scores(one, above, (5.0, 1.0, 0.5)) == {"nsd_1mm": 0.0, "nsd_2mm": 0.0, "hd95_mm": 5.0}


def test_half_a_surface_within_tolerance_is_half_the_score() -> None:
    truth = box(slice(0, 1), slice(0, 1), slice(0, 4))  # 4 voxels in a row, all surface
    predicted = box(slice(0, 1), slice(0, 1), slice(0, 8))  # the same and 4 more
    # d(p) = 0 0 0 0 1 2 3 4 and d(t) = 0 0 0 0
    found = surface_scores(predicted, truth, (1.0, 1.0, 1.0))
    assert found["nsd_1mm"] == 9 / 12 and found["nsd_2mm"] == 10 / 12
    assert found["hd95_mm"] == pytest.approx(np.percentile([0, 0, 0, 0, 1, 2, 3, 4], 95))


def test_voxels_at_the_volume_s_border_are_surface_and_inner_ones_are_not() -> None:
    full = np.ones((3, 3, 3), bool)
    hollow = full.copy()
    hollow[1, 1, 1] = False
    # The hollow's surface are its 26 voxels, those of the full one too: distances 0 on both sides.
    assert surface_scores(full, hollow, (1.0, 1.0, 1.0)) == {"nsd_1mm": 1.0, "nsd_2mm": 1.0, "hd95_mm": 0.0}


def test_empty_masks_and_missing_spacing_are_undefined_not_perfect() -> None:
    none, some = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert all(math.isnan(value) for value in surface_scores(none, none, (1.0, 1.0, 1.0)).values())
    assert all(math.isnan(value) for value in surface_scores(some, some, None).values())
    for pair in ((none, some), (some, none)):
        found = surface_scores(*pair, (1.0, 1.0, 1.0))
        assert (found["nsd_1mm"], found["nsd_2mm"]) == (0.0, 0.0) and math.isnan(found["hd95_mm"])


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (8.0, 0.68, 0.68), (3.0, 0.9, 1.1)])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore")  # MONAI's about itself
def test_surface_scores_are_monai_s(seed: int, spacing_mm: tuple[float, float, float]) -> None:
    metrics = pytest.importorskip("monai.metrics")
    generator = np.random.default_rng(seed)
    field = gaussian_filter(generator.normal(size=(9, 40, 40)), (1, 2, 2))
    other = field + 0.5 * gaussian_filter(generator.normal(size=field.shape), (1, 2, 2))
    predicted, truth = field > 0.08, other > 0.08
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]
    ours = surface_scores(predicted, truth, spacing_mm)
    for mm in (1, 2):
        theirs = metrics.compute_surface_dice(*pair, [float(mm)], include_background=True, spacing=spacing_mm)
        assert ours[f"nsd_{mm}mm"] == pytest.approx(float(theirs), abs=1e-6)
    theirs = metrics.compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing_mm)
    assert ours["hd95_mm"] == pytest.approx(float(theirs), rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_overlap_scores_are_monai_s() -> None:
    metrics = pytest.importorskip("monai.metrics")
    generator = np.random.default_rng(0)
    predicted, truth = generator.random((2, 9, 20, 20)) > 0.6
    counts = [
        int((p & t).sum())
        for p, t in ((predicted, truth), (predicted, ~truth), (~predicted, truth), (~predicted, ~truth))
    ]
    ours = scores_from_counts(counts)
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, truth)]
    assert ours["dice"] == pytest.approx(float(metrics.compute_dice(*pair)), abs=1e-6)
    assert ours["iou"] == pytest.approx(float(metrics.compute_iou(*pair)), abs=1e-6)
    matrix = metrics.get_confusion_matrix(*pair)
    for name in ("precision", "sensitivity", "specificity"):
        theirs = metrics.compute_confusion_matrix_metric(name, matrix)
        assert ours[name] == pytest.approx(float(theirs), abs=1e-6)
