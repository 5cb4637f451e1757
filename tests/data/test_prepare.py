"""Sources into a store: what is written, what is refused, and that nothing half-done has a final name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from distseg.data.layouts import find_cases, patient_of
from distseg.data.prepare import prepare_store
from distseg.data.store import Store, open_store
from distseg.errors import DistsegError

SHARED = Path(__file__).parents[3] / "shared" / "data"


def prepare(src: Path, root: Path, n_folds: int = 3) -> Store:
    return prepare_store(src, root, n_folds=n_folds, n_test=0, seed=0, workers=2)


@pytest.fixture
def source(phantom: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(phantom, tmp_path / "src"))


def rewrite(path: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
    image = nib.load(path)
    values, affine = change(np.asarray(image.dataobj).copy(), image.affine.copy())
    nib.save(nib.Nifti1Image(values, affine), path)


def test_a_store_holds_the_volumes_in_one_orientation(phantom: Path, store: Path) -> None:
    opened = open_store(store)
    assert [case.id for case in opened.cases] == [f"phantom_{i:03d}" for i in range(1, 7)]
    assert all(case.shape == (8, 64, 64) and case.intensity == "hu" for case in opened.cases)
    for case in (opened.cases[0], opened.cases[3]):  # the fourth is stored in another axis order
        image = nib.as_closest_canonical(nib.load(phantom / case.source))
        hu_ZYX, label_ZYX = opened.read_case(case)
        assert np.array_equal(hu_ZYX, np.asarray(image.dataobj)[::-1, ::-1].T)
        assert hu_ZYX.dtype == np.int16 and label_ZYX.dtype == np.uint8 and set(np.unique(label_ZYX)) <= {0, 1, 2}
        counts = np.bincount(label_ZYX.ravel(), minlength=3).tolist()
        assert list(case.label_voxels.values()) == counts
    assert not list(store.parent.glob(".*"))


def test_joint_masks_give_the_same_labels_as_separate_ones(source: Path, store: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "Lung_Mask")
    joint = prepare(source, tmp_path / "store")
    for one, other in zip(joint.cases, open_store(store).cases, strict=True):
        assert one.label_voxels == other.label_voxels


def test_preparing_again_reads_only_what_changed(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "store")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("case.json")}
    rewrite(source / "Infection_Mask" / "phantom_002.nii.gz", lambda values, affine: (values * 0, affine))
    again = prepare(source, tmp_path / "store")
    changed = [path.parent.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp]
    assert changed == ["phantom_002"] and again.cases[1].label_voxels["infection"] == 0


def test_series_of_one_patient_stay_together() -> None:
    assert patient_of("radiopaedia_10_85902_1") == patient_of("radiopaedia_10_85902_3") == "radiopaedia_10"
    assert patient_of("coronacases_001") == "coronacases_001"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda src: shutil.rmtree(src), "source: got .*src; no such folder"),
        (lambda src: shutil.rmtree(src / "COVID-19-CT-Seg_20cases"), "the layout must be that of Zenodo 3757476"),
        (lambda src: (src / "Lung_Mask/phantom_003.nii.gz").unlink(), "mask: got none for volume .*phantom_003"),
        (
            lambda src: (src / "COVID-19-CT-Seg_20cases/phantom_003.nii.gz").unlink(),
            "phantom_003 without a volume",
        ),
        (
            lambda src: rewrite(src / "Lung_Mask/phantom_002.nii.gz", lambda v, a: (v[:-1], a)),
            r"mask .*phantom_002.*got shape \(63, 64, 8\); it must be that of .*\(64, 64, 8\)",
        ),
        (
            lambda src: rewrite(src / "Lung_Mask/phantom_002.nii.gz", lambda v, a: (v, a @ np.diag([1, 1, 2, 1]))),
            "mask .*phantom_002.*got another affine",
        ),
        (
            lambda src: rewrite(src / "Infection_Mask/phantom_002.nii.gz", lambda v, a: (v + 7, a)),
            r"mask .*phantom_002.*got value 7; declared are \[0, 1\]",
        ),
        (
            lambda src: (src / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz").write_bytes(
                (src / "COVID-19-CT-Seg_20cases/phantom_001.nii.gz").read_bytes()[:9000]
            ),
            "volume .*phantom_001.*truncated",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_store(
    spoil: Callable[[Path], None], message: str, source: Path, tmp_path: Path
) -> None:
    spoil(source)
    with pytest.raises(DistsegError, match=message) as caught:
        prepare(source, tmp_path / "store")
    assert "\n" not in str(caught.value) and not (tmp_path / "store").exists()


def test_more_folds_than_patients_and_a_foreign_folder_are_refused(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(DistsegError, match="7 folds and 0 test patients for 6 patients; every fold needs a patient"):
        prepare(phantom, tmp_path / "store", n_folds=7)
    with pytest.raises(DistsegError, match="which holds something else"):
        prepare(phantom, phantom)


def test_a_store_of_another_version_or_damaged_is_refused(store: Path, tmp_path: Path) -> None:
    values = json.loads((store / "store.json").read_text())
    for spoiled, message in (
        (json.dumps(values | {"version": 99}), "got version 99; this distseg reads 1"),
        (json.dumps(values)[:300], "damaged"),
        (json.dumps({k: v for k, v in values.items() if k != "folds"}), "damaged store.json .missing 'folds'"),
    ):
        (tmp_path / "store.json").write_text(spoiled)
        with pytest.raises(DistsegError, match=message):
            open_store(tmp_path)
    with pytest.raises(DistsegError, match="without store.json"):
        open_store(tmp_path / "nowhere")


@pytest.mark.skipif(not (SHARED / "medseg9").is_dir(), reason="the real CT volumes are not on this machine")
def test_real_grey_volumes_are_found_and_grouped_by_patient() -> None:
    cases = find_cases(SHARED / "medseg9")
    assert len(cases) == 7 and len({case.patient for case in cases}) == 5
