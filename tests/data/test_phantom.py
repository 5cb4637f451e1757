"""The phantom looks like chest CT in its numbers, is hard enough to be worth learning, and is the same in every run."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data.phantom import PhantomCase, make_case, write_phantom
from distseg.errors import DistsegError
from distseg.phantom import main

SIZE, SLICES, SEED = 96, 20, 0
FOLDERS = ("COVID-19-CT-Seg_20cases", "Lung_Mask", "Infection_Mask", "Lung_and_Infection_Mask")


@pytest.fixture(scope="module")
def cases() -> list[PhantomCase]:
    return [make_case(SEED, index, SIZE, SLICES) for index in range(8)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "set"
    write_phantom(out, 4, SEED, SIZE, SLICES)
    return out


def canonical_ZYX(path: Path) -> np.ndarray:
    """The voxels in RAS+ order, as [Z, Y, X]: y grows to anterior, x to the patient's right hand's other side."""
    return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj).T


def infection_dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((prediction & truth).sum()) / float(prediction.sum() + truth.sum())


def test_a_case_is_a_function_of_its_arguments_alone(cases):
    again = make_case(SEED, 3, SIZE, SLICES)
    np.testing.assert_array_equal(again.hu_ZYX, cases[3].hu_ZYX)
    np.testing.assert_array_equal(again.label_ZYX, cases[3].label_ZYX)
    assert not np.array_equal(again.label_ZYX, make_case(SEED + 1, 3, SIZE, SLICES).label_ZYX)
    assert not np.array_equal(cases[3].label_ZYX, cases[2].label_ZYX)


def test_types_shape_spacing_and_labels(cases):
    for case in cases:
        assert case.hu_ZYX.shape == case.label_ZYX.shape == (SLICES, SIZE, SIZE)
        assert (case.hu_ZYX.dtype, case.label_ZYX.dtype) == (np.int16, np.uint8)
        assert case.spacing_mm == pytest.approx((280 / SLICES, 360 / SIZE, 360 / SIZE))
        assert set(np.unique(case.label_ZYX)) <= {0, 1, 2}


def test_hu_of_air_lung_soft_tissue_and_bone_are_plausible(cases):
    for case in cases:
        corner, middle = case.hu_ZYX[:, :8, :8], SIZE // 2
        liver = case.hu_ZYX[1, middle - 5 : middle + 5, middle - 20 : middle - 10]
        spine = case.hu_ZYX[:, middle + 6 : middle + 30, middle - 8 : middle + 8]
        assert np.median(corner) == pytest.approx(-1000, abs=15)
        assert np.median(case.hu_ZYX[case.label_ZYX == 1]) == pytest.approx(-830, abs=60)
        assert np.median(liver) == pytest.approx(58, abs=25)
        assert (spine > 300).mean() > 0.02
        assert -1024 <= case.hu_ZYX.min() and case.hu_ZYX.max() < 2000


def test_the_lungs_have_a_living_patients_size_and_the_right_one_is_larger(cases):
    for case in cases:
        lung = case.label_ZYX > 0
        assert 2500 < lung.sum() * np.prod(case.spacing_mm) / 1000 < 7000  # ml
        assert lung[:, :, : SIZE // 2].sum() > lung[:, :, SIZE // 2 :].sum()
        area = lung.sum(axis=(1, 2))
        assert area[0] < area[SLICES // 2] > 2 * area[-3] and area[-1] == 0


def test_another_sampling_shows_the_same_patient(cases):
    finer = make_case(SEED, 6, 2 * SIZE, SLICES).label_ZYX[:, ::2, ::2]
    for label, least in ((1, 0.93), (2, 0.8)):
        assert infection_dice(finer == label, cases[6].label_ZYX == label) > least


def test_most_patients_are_infected_but_not_all_and_not_in_every_slice(cases):
    infected = [case for case in cases if (case.label_ZYX == 2).any()]
    assert 5 <= len(infected) <= 7
    with_infection = [(case.label_ZYX == 2).any(axis=(1, 2)).mean() for case in cases]
    assert 0.25 < np.mean(with_infection) < 0.7
    burdens = [(case.label_ZYX == 2).sum() / (case.label_ZYX > 0).sum() for case in infected]
    assert min(burdens) < 0.01 and max(burdens) > 0.08


def test_infection_holds_ground_glass_and_consolidation(cases):
    hu = np.concatenate([case.hu_ZYX[case.label_ZYX == 2] for case in cases])
    assert ((hu > -700) & (hu < -350)).mean() > 0.2
    assert ((hu > -150) & (hu < 100)).mean() > 0.05


def test_infection_is_denser_than_lung_yet_no_threshold_segments_it(cases):
    lung = np.concatenate([case.label_ZYX[case.label_ZYX > 0] for case in cases])
    hu = np.concatenate([case.hu_ZYX[case.label_ZYX > 0] for case in cases])
    truth = lung == 2
    assert np.median(hu[truth]) > np.median(hu[~truth]) + 200
    windows = [(low, high) for low in range(-900, 0, 50) for high in range(low + 50, 301, 50)]
    best = max(infection_dice((hu > low) & (hu < high), truth) for low, high in windows)
    assert 0.15 < best < 0.7


def test_constant_and_random_predictions_score_low(cases):
    label = np.stack([case.label_ZYX for case in cases])
    lung, truth = label > 0, label == 2
    coin = lung & (np.random.default_rng(0).random(label.shape) < 0.5)
    assert infection_dice(np.zeros_like(truth), truth) == 0
    assert infection_dice(lung, truth) < 0.25
    assert infection_dice(coin, truth) < 0.25


def test_the_four_folders_hold_matching_masks(written):
    for index in range(4):
        case, name = make_case(SEED, index, SIZE, SLICES), f"phantom_{index + 1:03d}.nii.gz"
        hu, lung, infection, joint = (canonical_ZYX(written / folder / name)[:, ::-1, ::-1] for folder in FOLDERS)
        # RAS+ turned back to LPS by the two flips: what make_case gives, whatever order the file had.
        flipped = hu[:, :, ::-1] if np.array_equal(hu[:, :, ::-1], case.hu_ZYX) else hu
        np.testing.assert_array_equal(flipped, case.hu_ZYX)
        np.testing.assert_array_equal(infection > 0, joint == 3)
        np.testing.assert_array_equal(lung > 0, joint > 0)
        assert set(np.unique(lung)) == {0, 1, 2}
