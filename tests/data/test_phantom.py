"""The phantom looks like chest CT in its numbers, is hard enough to be worth learning, and is the same in every run."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.commands.phantom import main
from distseg.errors import DistsegError
from distseg.phantoms.case import PhantomCase, make_case, write_phantom

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


def canonical(path: Path) -> np.ndarray:
    """The voxels in RAS+ order [X, Y, Z]: x grows to the patient's right, y to anterior, z to superior."""
    return np.asanyarray(nib.as_closest_canonical(nib.load(path)).dataobj)


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
        assert case.hu_ZYX.min() >= -1024 and case.hu_ZYX.max() < 2000


def test_the_lungs_have_a_living_patients_size_and_the_right_one_is_larger(cases):
    for case in cases:
        lung = case.label_ZYX > 0
        assert 2500 < lung.sum() * np.prod(case.spacing_mm) / 1000 < 7000  # ml
        assert lung[:, :, : SIZE // 2].sum() > lung[:, :, SIZE // 2 :].sum()
        area = lung.sum(axis=(1, 2))
        assert area[0] < area[SLICES // 2] > 1.5 * area[-3] and area[-1] == 0


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


@pytest.mark.parametrize("index", range(4))
def test_the_four_folders_hold_the_case_in_any_voxel_order(written, index):
    name, case = f"phantom_{index + 1:03d}.nii.gz", make_case(SEED, index, SIZE, SLICES)
    order = nib.aff2axcodes(nib.load(written / FOLDERS[0] / name).affine)
    assert order == (("R", "A", "S") if index == 3 else ("L", "P", "S"))
    hu, lung, infection, joint = (canonical(written / folder / name)[::-1, ::-1].T for folder in FOLDERS)
    np.testing.assert_array_equal(hu, case.hu_ZYX)
    np.testing.assert_array_equal(lung > 0, case.label_ZYX > 0)
    np.testing.assert_array_equal(infection, case.label_ZYX == 2)
    np.testing.assert_array_equal(joint, np.where(infection == 1, 3, lung))


@pytest.mark.parametrize("index", [0, 3])
def test_the_file_puts_the_table_behind_and_each_lung_on_its_side(written, index):
    name = f"phantom_{index + 1:03d}.nii.gz"
    image = canonical(written / FOLDERS[0] / name)
    behind, before = image[:, : SIZE // 6], image[:, -SIZE // 6 :]
    assert (behind > -700).mean() > 0.02 > (before > -700).mean()
    mask = nib.load(written / "Lung_Mask" / name)
    for value, sign in ((1, -1), (2, 1)):  # left lung, right lung; the world's x grows to the right
        voxels = np.argwhere(np.asanyarray(mask.dataobj) == value)
        assert (nib.affines.apply_affine(mask.affine, voxels)[:, 0] * sign > 0).all()


def test_the_same_arguments_write_the_same_bytes(written, tmp_path):
    write_phantom(tmp_path / "again", 2, SEED, SIZE, SLICES)
    for folder in FOLDERS:
        for file in (tmp_path / "again" / folder).iterdir():
            assert file.read_bytes() == (written / folder / file.name).read_bytes()
            assert file.read_bytes()[4:8] == bytes(4)  # gzip's time stamp, which a second's pause would change
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(DistsegError, match="not empty"):
        write_phantom(tmp_path, 1, SEED, 64, 8)
    assert main([str(tmp_path), "--cases", "1", "--size", "64", "--slices", "8"]) == 1
    assert capsys.readouterr().err.startswith("error: phantom: got ")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def stop_at_the_second(seed, index, size, n_slices, fields_mm: tuple[float, float]):
        if index == 1:
            raise OSError("disk full")
        return make_case(seed, index, size, n_slices, fields_mm)

    monkeypatch.setattr("distseg.phantoms.case.make_case", stop_at_the_second)
    with pytest.raises(OSError, match="disk full"):
        write_phantom(tmp_path / "set", 2, SEED, 64, 8)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_a_set_and_says_how_many_are_infected(tmp_path, capsys):
    arguments = ["--cases", "2", "--size", "64", "--slices", "8", "--seed", "1"]
    assert main([str(tmp_path / "set"), *arguments]) == 0
    masks = [nib.load(path) for path in sorted((tmp_path / "set" / "Infection_Mask").iterdir())]
    infected = sum(bool(np.any(mask.dataobj)) for mask in masks)
    assert f"2 cases of 8 slices, {infected} with infection" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--cases=0", "--size=63", "--slices=7", "--seed=-1"])
def test_wrong_numbers_are_wrong_use(tmp_path, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "set"), wrong])
    assert stop.value.code == 2 and "must be at least" in capsys.readouterr().err


def test_fields_of_view_differ_and_show_the_same_patients() -> None:
    own = [make_case(SEED, index, SIZE, SLICES) for index in range(3)]
    wide = [make_case(SEED, index, SIZE, SLICES, (360.0, 600.0)) for index in range(3)]
    assert {case.spacing_mm[1] for case in own} == {360.0 / SIZE}
    sizes = [case.spacing_mm[1] * SIZE for case in wide]
    assert len(set(sizes)) == 3 and min(sizes) >= 360 and max(sizes) <= 600
    for one, other in zip(own, wide, strict=True):
        ml, other_ml = (np.count_nonzero(case.label_ZYX) * np.prod(case.spacing_mm) / 1000 for case in (one, other))
        assert abs(other_ml / ml - 1) < 0.05
