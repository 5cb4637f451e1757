"""TCIA's folders of CT series and DICOM-SEG files, of any names, known by their headers."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from distseg.data.layouts.finding import Asked, find_source, source_in_words
from distseg.data.preparing import FoldRule, prepare_store
from distseg.errors import DistsegError
from tests.data.test_dicom import HU_ZYX, write_segmentation, write_series

FIRST, SECOND = HU_ZYX > 700, HU_ZYX < -500


def write_ct(folder: Path, patient: str, shift: int = 0) -> list[Path]:
    uid = generate_uid()

    def change(_: int, image: Dataset) -> None:
        image.PatientID, image.SeriesInstanceUID = patient, uid
        image.RescaleIntercept += shift  # another image

    return write_series(folder, change=change)


def write_reading(path: Path, files: list[Path], masks: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True)
    dataset = pydicom.dcmread(write_segmentation(path, files, masks))
    for segment in dataset.SegmentSequence:
        segment.SegmentedPropertyTypeCodeSequence[0].CodeMeaning = codes.SCT.Nodule.meaning
    dataset.save_as(path)


@pytest.fixture
def lidc(tmp_path: Path) -> Path:
    """Three patients: of the first three readers of two nodules, of the second one, of the third none."""
    src = tmp_path / "LIDC-IDRI"
    for k in (1, 2, 3):
        study = src / f"LIDC-IDRI-{k:04d}/01-01-2000-NA-NA-3017{k}"
        files = write_ct(study / f"3000566.000000-NA-0319{k}", f"LIDC-IDRI-{k:04d}", shift=k)
        if k < 3:
            for reader, nodule, mask in (
                (1, 1, FIRST),
                (2, 1, FIRST & (HU_ZYX > 900)),
                (3, 1, FIRST & (HU_ZYX > 800)),
                (1, 2, SECOND),
            ):
                if k == 1 or reader == 1:
                    label = f"Nodule {nodule} - Annotation {reader}"
                    write_reading(study / f"30{nodule}.000000-Segmentation {label}/1-1.dcm", files, {label: mask})
    (src / "LICENSE").write_text("CC BY")
    return src


@pytest.mark.parametrize(
    ("readers", "expected"),
    [("union", FIRST | SECOND), ("majority", (HU_ZYX > 800) | SECOND), ("first", FIRST | SECOND)],
)
def test_readers_of_a_finding_are_joined_and_findings_added(
    readers: str, expected: np.ndarray, lidc: Path, tmp_path: Path
) -> None:
    store, notes = prepare_store(lidc, tmp_path / "store", FoldRule(2), readers=readers, workers=1)  # type: ignore[arg-type]
    assert store.layout == "dicom-seg" and dict(store.labels) == {"background": 0, "nodule": 1}
    assert [(case.id, case.patient) for case in store.cases] == [(f"LIDC-IDRI-000{k}",) * 2 for k in (1, 2)]
    assert np.array_equal(store.read_case(store.cases[0])[1], expected)
    assert "left out: 1 CT series without a segmentation; left out: LICENSE" in notes[0]
    assert any(f"1 volumes have a mask of several files: taken is their {readers}" in note for note in notes)


def test_segments_of_one_file_are_labels_by_their_names(tmp_path: Path) -> None:
    for k in (1, 2):
        files = write_ct(tmp_path / f"src/p{k}/ct", f"p{k}", shift=k)
        write_segmentation(tmp_path / f"src/p{k}/seg.dcm", files, {"Lung-Left": SECOND, "Neoplasm, Primary": FIRST})
    store, _ = prepare_store(tmp_path / "src", tmp_path / "store", FoldRule(2), workers=1)
    assert dict(store.labels) == {"background": 0, "lung_left": 1, "neoplasm_primary": 2}
    assert np.array_equal(store.read_case(store.cases[1])[1], np.where(FIRST, 2, SECOND))
    asked = Asked(labels={"background": 0, "neoplasm_primary": 5})
    store, notes = prepare_store(tmp_path / "src", tmp_path / "other", FoldRule(2), asked=asked, workers=1)
    assert "segments that --labels does not name: lung_left" in notes[0]
    assert np.array_equal(store.read_case(store.cases[1])[1], np.where(FIRST, 5, 0))


def test_a_finding_is_not_hidden_by_the_lung_that_a_file_numbers_higher(tmp_path: Path) -> None:
    for k in (1, 2):
        files = write_ct(tmp_path / f"src/p{k}/ct", f"p{k}", shift=k)
        for kind in ("BINARY", "FRACTIONAL")[k - 1 : k]:
            write_segmentation(
                tmp_path / f"src/p{k}/seg.dcm", files, {"infection": FIRST, "lung": FIRST | SECOND}, kind
            )
    store, _ = prepare_store(tmp_path / "src", tmp_path / "store", FoldRule(2), workers=1)
    assert dict(store.labels) == {"background": 0, "lung": 1, "infection": 2}
    for case in store.cases:
        assert np.array_equal(store.read_case(case)[1], np.where(FIRST, 2, SECOND))


def test_two_series_of_one_patient_are_two_cases_and_other_modalities_are_named(tmp_path: Path) -> None:
    for name in ("before", "after"):
        files = write_ct(tmp_path / f"p1/{name}", "p1")
        write_segmentation(tmp_path / f"p1/{name}.dcm", files, {"nodule": FIRST})
    write_series(tmp_path / "p1/scout", change=lambda _, image: setattr(image, "Modality", "DX"))
    source = find_source(tmp_path)
    assert [case.id for case in source.cases] == [
        "p1_after",
        "p1_before",
    ] and "folders of other modalities (DX)" in source_in_words(source)


def test_a_segmentation_without_its_series_is_named(lidc: Path) -> None:
    for path in (lidc / "LIDC-IDRI-0002").glob("*/3000566*/*"):
        path.unlink()
    with pytest.raises(DistsegError, match="got .*LIDC-IDRI-0002.*, which refers to series .* that is not there"):
        find_source(lidc)
