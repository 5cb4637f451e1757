"""DICOM-SEG out: on the slices it came from, however they are stored, and readable by others."""

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from distseg.data.dicom import on_grid, read_dicom_series, read_segmentation
from distseg.data.dicom_seg import own_code, write_segmentation
from distseg.errors import DistsegError
from distseg.pictures import LABEL_COLOURS
from tests.data.test_dicom import AXIAL, CORONAL, HU_ZYX, SAGITTAL, SPACING_MM, write_enhanced, write_series

REGIONS = {"lung": (1, 2), "infection": (2,)}
LABEL_ZYX = (HU_ZYX > 0).astype(np.uint8) + (HU_ZYX > 900)
WEIGHTS = "0123456789abcdef" * 4


@pytest.mark.parametrize("kind", ["axial", "coronal", "sagittal", "enhanced"])
@pytest.mark.parametrize("label_ZYX", [LABEL_ZYX, np.zeros_like(LABEL_ZYX)], ids=["found", "nothing"])
def test_the_label_map_of_any_series_comes_back_where_it_was(kind: str, label_ZYX: np.ndarray, tmp_path: Path) -> None:
    if kind == "enhanced":
        files = [write_enhanced(tmp_path / "enhanced")]  # its frames are not in the order of its slices
    else:
        orientation = {"axial": AXIAL, "coronal": CORONAL, "sagittal": SAGITTAL}[kind]
        files = write_series(tmp_path / "series", orientation)
    write_segmentation(tmp_path / "seg.dcm", label_ZYX, files, REGIONS, WEIGHTS)
    back, names = read_segmentation(tmp_path / "seg.dcm")
    assert names == {1: "lung", 2: "infection"}
    assert np.array_equal(on_grid(back, read_dicom_series(files)), label_ZYX)


def test_segments_reference_their_slices_and_say_what_they_are(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series")
    write_segmentation(tmp_path / "seg.dcm", LABEL_ZYX, files, REGIONS, WEIGHTS)
    images = sorted((pydicom.dcmread(file) for file in files), key=lambda image: image.ImagePositionPatient[2])
    segmentation = hd.seg.segread(tmp_path / "seg.dcm")
    of_slices = segmentation.get_pixels_by_source_instance([image.SOPInstanceUID for image in images])
    assert np.array_equal(of_slices[..., 0], LABEL_ZYX > 0)  # the infected lung is lung
    assert np.array_equal(of_slices[..., 1], LABEL_ZYX == 2)
    geometry = segmentation.get_volume_geometry()
    assert geometry is not None and geometry.spacing == SPACING_MM
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        image = next(image for image in images if image.SOPInstanceUID == source)
        assert frame.PlanePositionSequence[0].ImagePositionPatient == image.ImagePositionPatient
    lung, infection = (segmentation.get_segment_description(number) for number in (1, 2))
    assert lung.segmented_property_type.value == "39607008" and lung.segmented_property_type.meaning == "Lung"
    assert infection.segmented_property_category.meaning == "Morphologically Abnormal Structure"
    assert infection.anatomic_regions[0].value == "39607008"
    algorithm = lung.algorithm_identification
    assert (algorithm.name, algorithm.parameters) == ("distseg", {"weights_sha256": WEIGHTS})
    assert segmentation.SeriesDescription == "distseg: lung, infection" and segmentation.PatientID == "patient 7"
    assert segmentation.SegmentationType == "BINARY" and segmentation.StudyInstanceUID == images[0].StudyInstanceUID


@pytest.mark.parametrize(
    ("encoding", "name"),
    [(["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎"), ("ISO_IR 144", "Иванов^Иван"), ("ISO_IR 100", "Müller")],
)
def test_a_patient_s_name_comes_back_in_any_character_set(encoding: str | list[str], name: str, tmp_path: Path) -> None:
    def named(_: int, dataset: Dataset) -> None:
        dataset.SpecificCharacterSet, dataset.PatientName = encoding, name

    write_segmentation(tmp_path / "seg.dcm", LABEL_ZYX, write_series(tmp_path / "s", change=named), REGIONS, WEIGHTS)
    assert pydicom.dcmread(tmp_path / "seg.dcm").PatientName == name


def test_viewers_show_a_segment_in_the_colour_of_its_pictures(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series")
    regions = {"lung": (1, 2), "infection": (2,), "crazy paving": (12,)}
    write_segmentation(tmp_path / "seg.dcm", LABEL_ZYX, files, regions, WEIGHTS)
    for segment, label in zip(pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence, (1, 2, 12), strict=True):
        shown = hd.color.CIELabColor.from_dicom_value(segment.RecommendedDisplayCIELabValue)
        assert "#{:02x}{:02x}{:02x}".format(*shown.to_rgb()) == LABEL_COLOURS[label - 1]


def test_a_region_of_another_name_has_a_code_of_our_own(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series")
    write_segmentation(tmp_path / "seg.dcm", LABEL_ZYX, files, {"crazy paving": (1,)}, WEIGHTS)
    code = hd.seg.segread(tmp_path / "seg.dcm").get_segment_description(1).segmented_property_type
    assert (code.scheme_designator, code.meaning) == ("99DISTSEG", "crazy paving")
    assert own_code("nodule").value == "NODULE" and own_code("left lung").value != own_code("left_lung").value
    assert len(own_code("a name of more than sixteen").value) == 16


def test_a_series_without_patient_data_is_enough_but_not_one_without_a_frame_of_reference(tmp_path: Path) -> None:
    def strip(_: int, dataset: Dataset) -> None:
        for name in ("PatientName", "PatientBirthDate", "AccessionNumber", "StudyDate", "StudyTime", "StudyID"):
            del dataset[name]

    files = write_series(tmp_path / "anonymous", change=strip)
    write_segmentation(tmp_path / "seg.dcm", LABEL_ZYX, files, REGIONS, WEIGHTS)
    assert read_segmentation(tmp_path / "seg.dcm")[1] == {1: "lung", 2: "infection"}
    files = write_series(tmp_path / "nowhere", change=lambda _, dataset: dataset.pop("FrameOfReferenceUID"))
    with pytest.raises(DistsegError, match="got no FrameOfReferenceUID"):
        write_segmentation(tmp_path / "never.dcm", LABEL_ZYX, files, REGIONS, WEIGHTS)
    assert not (tmp_path / "never.dcm").exists()
