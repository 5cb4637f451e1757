"""Real DICOM files: CT series however they are stored, masks as DICOM-SEG, and series that are no volume."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import (
    MPEG4HP41,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from distseg.data.dicom import on_grid, read_dicom_series, read_patient_id, read_segmentation
from distseg.data.file_kinds import is_dicom, series_files
from distseg.data.preparing import FoldRule, prepare_store
from distseg.errors import DistsegError

SHARED = Path(__file__).parents[3] / "shared" / "data"
HU_ZYX = np.random.default_rng(0).integers(-1000, 1500, (5, 12, 16)).astype(np.int16)  # LPS
SPACING_MM = (2.5, 0.7, 0.8)  # z, y, x
AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]


def blank(sop_class: str, study: str = "1.2.3") -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = sop_class
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, f"{study}.4", f"{study}.5"
    dataset.PatientID, dataset.PatientName, dataset.Modality = "patient 7", "", "CT"
    dataset.PatientBirthDate = dataset.PatientSex = dataset.StudyID = dataset.AccessionNumber = ""
    dataset.StudyDate = dataset.StudyTime = dataset.ReferringPhysicianName = ""
    dataset.ImageType, dataset.SeriesNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 1
    return dataset


def stored(hu: np.ndarray) -> bytes:
    return ((hu.astype(np.int32) + 1024) // 2).astype("<i2").tobytes()


def slices_of(orientation: Sequence[float]) -> list[tuple[np.ndarray, list[float]]]:
    """The test volume cut as a scanner of that orientation would: pixels and position of each slice."""
    z, y, x = (np.arange(n) * mm for n, mm in zip(HU_ZYX.shape, SPACING_MM, strict=True))
    if orientation is AXIAL:
        return [(HU_ZYX[i], [0, 0, z[i]]) for i in range(len(z))]
    if orientation is CORONAL:  # rows to the Left, columns downwards
        return [(HU_ZYX[::-1, i], [0, y[i], z[-1]]) for i in range(len(y))]
    return [(HU_ZYX[::-1, :, i], [x[i], 0, z[-1]]) for i in range(len(x))]  # rows to Posterior, columns downwards


def write_series(
    folder: Path, orientation: Sequence[float] = AXIAL, change: Callable[[int, Dataset], object] | None = None
) -> list[Path]:
    """One file a slice, in an order of names that is not that of the slices. Odd HU lose their last bit."""
    folder.mkdir(parents=True, exist_ok=True)
    z_mm, y_mm, x_mm = SPACING_MM
    spacing = {id(AXIAL): [y_mm, x_mm], id(CORONAL): [z_mm, x_mm], id(SAGITTAL): [z_mm, y_mm]}[id(orientation)]
    files = []
    for index, (pixels, position) in enumerate(slices_of(orientation)):
        dataset = blank(CTImageStorage)
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.ImagePositionPatient, dataset.ImageOrientationPatient = [float(v) for v in position], list(orientation)
        dataset.PixelSpacing, dataset.SliceThickness, dataset.InstanceNumber = spacing, z_mm, index + 1
        dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
        dataset.PixelData = stored(pixels)
        if change:
            change(index, dataset)
        files.append(folder / f"IM{(index * 7) % 31:04d}")
        dataset.save_as(files[-1], enforce_file_format=True)
    return sorted(files)


def write_enhanced(path: Path) -> Path:
    dataset = blank(EnhancedCTImageStorage)
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = HU_ZYX.shape
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = AXIAL
    measures.PixelSpacing, measures.SliceThickness = list(SPACING_MM[1:]), SPACING_MM[0]
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    order = [3, 0, 4, 1, 2]
    groups, pixels = [], b""
    for place, z in enumerate(order):
        own, position, rescale = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0.0, 0.0, z * SPACING_MM[0]]
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, -100 * place, "HU"  # each its own
        own.PlanePositionSequence, own.PixelValueTransformationSequence = [position], [rescale]
        groups.append(own)
        pixels += (HU_ZYX[z] + 100 * place).astype("<i2").tobytes()
    dataset.PerFrameFunctionalGroupsSequence, dataset.PixelData = groups, pixels
    dataset.save_as(path, enforce_file_format=True)
    return path


def write_segmentation(path: Path, sources: Sequence[Path], masks: dict[str, np.ndarray], kind: str = "BINARY") -> Path:
    """Masks along the series' slices; fractions for FRACTIONAL; for LABELMAP later ones over earlier ones."""
    images = sorted((pydicom.dcmread(file) for file in sources), key=lambda image: image.InstanceNumber)
    described = [
        hd.seg.SegmentDescription(
            number, label, codes.SCT.Organ, codes.SCT.Lung, "MANUAL",
        )
        for number, label in enumerate(masks, start=1)
    ]  # fmt: skip
    pixels = np.stack(list(masks.values()), axis=-1)
    if kind == "LABELMAP":
        pixels = (pixels * np.arange(1, len(masks) + 1)).max(axis=-1)
    pixels = pixels.astype(np.float32 if kind == "FRACTIONAL" else np.uint8)
    segmentation = hd.seg.Segmentation(
        images, pixels, kind, described, generate_uid(), 9,
        generate_uid(), 1, "distseg", "tests", "1", "1",
    )  # fmt: skip
    segmentation.save_as(path)
    return path


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL], ids=["axial", "coronal", "sagittal"])
def test_a_series_in_any_order_and_orientation_is_one_volume_in_hu(orientation: list[float], tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", orientation)
    assert all(is_dicom(path) for path in files) and read_patient_id(files[0]) == "patient 7"
    volume = read_dicom_series(files)
    assert np.array_equal(volume.values_ZYX, HU_ZYX // 2 * 2) and volume.spacing_mm == SPACING_MM
    assert volume.affine is not None and np.allclose(volume.affine, np.diag([-0.8, -0.7, 2.5, 1]))


def test_an_enhanced_file_with_a_rescale_of_each_frame_is_the_same_volume(tmp_path: Path) -> None:
    volume = read_dicom_series([write_enhanced(tmp_path / "enhanced")])
    assert np.array_equal(volume.values_ZYX, HU_ZYX) and volume.spacing_mm == SPACING_MM


def test_files_are_known_by_what_they_hold(tmp_path: Path) -> None:
    series = write_series(tmp_path / "series")[0]
    for name, content in (("DICOMDIR", series.read_bytes()), (".hidden", series.read_bytes()), ("a.dcm", b"text")):
        (tmp_path / name).write_bytes(content)
        assert not is_dicom(tmp_path / name)
    assert not is_dicom(tmp_path) and not is_dicom(tmp_path / "none")
    no_id = write_series(tmp_path / "no id", change=lambda _, d: setattr(d, "PatientID", ""))
    assert read_patient_id(no_id[0]) is None


@pytest.mark.parametrize(
    "content", [b"", b"<html>504</html>" * 20, b"lost", None], ids=["empty", "page", "text", "link"]
)
def test_a_file_of_a_series_that_is_no_slice_fails_it_by_name(content: bytes | None, tmp_path: Path) -> None:
    last = write_series(tmp_path / "series")[-1]
    last.unlink()
    last.write_bytes(content) if content is not None else last.symlink_to("nowhere")
    for name in ("DICOMDIR", "shot.JPG", "readme.txt", ".hidden"):
        (tmp_path / "series" / name).write_bytes(b"x" * 200)
    (tmp_path / "series/more").mkdir()
    files, beside = series_files(tmp_path / "series")
    assert last in files and [path.name for path in beside] == ["DICOMDIR", "more", "readme.txt", "shot.JPG"]
    with pytest.raises(DistsegError, match=f"{last.name}.*not readable"):
        read_dicom_series(files)


def test_deflated_files_and_slices_counted_downwards_are_read(tmp_path: Path) -> None:
    def deflate(_: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    volume = read_dicom_series(write_series(tmp_path / "deflated", change=deflate))
    assert np.array_equal(volume.values_ZYX, read_dicom_series(write_series(tmp_path / "plain")).values_ZYX)
    down = write_series(tmp_path / "down", change=lambda _, d: setattr(d, "SpacingBetweenSlices", -9))
    assert read_dicom_series(down[:1]).spacing_mm == SPACING_MM


def test_one_slice_is_as_high_as_it_is_thick_and_rounded_positions_are_no_gap(tmp_path: Path) -> None:
    files = write_series(tmp_path / "one")
    assert read_dicom_series(files[:1]).spacing_mm == SPACING_MM
    positions = [0, 0.7, 1.5, 2.2, 3.0]  # 0.75 mm apart
    rounded = write_series(
        tmp_path / "rounded", change=lambda i, d: setattr(d, "ImagePositionPatient", [0, 0, positions[i]])
    )
    assert read_dicom_series(rounded).spacing_mm == (0.75, *SPACING_MM[1:])


def test_padding_declared_unsigned_is_found_among_signed_values(tmp_path: Path) -> None:
    def pad(_: int, dataset: Dataset) -> None:
        dataset.PixelData = np.int16(-20).tobytes() + dataset.PixelData[2:]
        dataset.PixelPaddingValue = 65536 - 20
        dataset["PixelPaddingValue"].VR = "US"

    assert (read_dicom_series(write_series(tmp_path / "series", change=pad)).values_ZYX[:, 0, 0] == -1024).all()


def test_padding_becomes_air_and_compressed_slices_are_read(tmp_path: Path) -> None:
    def pad(index: int, dataset: Dataset) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<i2").copy()
        pixels[:3] = (-2000, -1900, -1800)
        dataset.PixelData = pixels.tobytes()
        dataset.PixelPaddingValue, dataset.PixelPaddingRangeLimit = -2000, -1900
        dataset["PixelPaddingValue"].VR = dataset["PixelPaddingRangeLimit"].VR = "SS"
        if index == 1:
            dataset.compress(RLELossless)

    values = read_dicom_series(write_series(tmp_path / "series", change=pad)).values_ZYX
    assert (values[:, 0, :2] == -1024).all() and (values[:, 0, 2] == -1800 * 2 - 1024).all()
    assert np.array_equal(values[:, 1:], (HU_ZYX // 2 * 2)[:, 1:])


def moved(index: int, **values: Any) -> Callable[[int, Dataset], None]:
    def change(at: int, dataset: Dataset) -> None:
        if at == index:
            for name, value in values.items():
                setattr(dataset, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (moved(2, SeriesInstanceUID="9.9", SeriesDescription="thin"), "got 2 series .*'1.2.3.4' .*'9.9' 'thin'"),
        (moved(4, ImagePositionPatient=[0, 0, 12.5]), "lies 5.00 mm above .*, others 2.50 mm; slices may be missing"),
        (moved(3, ImagePositionPatient=[0, 0, 5.0]), "lies at the same place as"),
        (lambda i, d: setattr(d, "ImagePositionPatient", [0, i * 0.5, i * 2.5]), "a gantry tilt"),
        (moved(1, ImageOrientationPatient=CORONAL), "got another orientation than"),
        (moved(1, PixelSpacing=[1, 1]), "got another spacing than"),
        (moved(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "got a localizer"),
        (moved(0, SOPClassUID="1.2.840.10008.5.1.4.1.1.4"), "got 'MR Image Storage'; it must be a CT image"),
        (moved(0, RescaleSlope=None), "got no RescaleSlope"),
        (moved(0, ImagePositionPatient=None), "got no ImagePositionPatient"),
        (moved(0, PixelData=b"12345678"), "not readable"),
        (moved(0, NumberOfFrames=2), "got 2 frames and the positions of 1"),
        (moved(0, RescaleSlope="1e300"), "got absurd values .*1e.300"),
        (moved(0, ImagePositionPatient=[1, 2]), "not readable"),
        (lambda _, d: setattr(d, "PixelSpacing", ["1e-9", "1e-9"]), "got voxels of"),
        (moved(0, Rows=60000, Columns=60000), "got another shape than"),
        (lambda _, d: (setattr(d, "Rows", 60000), setattr(d, "Columns", 60000)), "must hold 1 to 2147483648 voxels"),
    ],
)
def test_what_is_no_volume_is_one_line_that_names_a_file(
    change: Callable[[int, Dataset], object], message: str, tmp_path: Path
) -> None:
    files = write_series(tmp_path / "series", change=change)
    with pytest.raises(DistsegError, match=message) as caught:
        read_dicom_series(files)
    assert "\n" not in str(caught.value) and str(tmp_path / "series") in str(caught.value)


def test_compression_that_nothing_decodes_is_named(tmp_path: Path) -> None:
    def compress(_: int, dataset: Dataset) -> None:
        dataset.file_meta.TransferSyntaxUID = MPEG4HP41  # a film
        dataset.PixelData = encapsulate([b"film"])
        dataset["PixelData"].is_undefined_length = True

    with pytest.raises(DistsegError, match="MPEG-4 AVC/H.264 High Profile.* no installed package decodes it"):
        read_dicom_series(write_series(tmp_path / "series", change=compress))


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL], ids=["axial", "coronal"])
@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_of_overlapping_segments_the_higher_number_is_kept(kind: str, orientation: list[float], tmp_path: Path) -> None:
    files = write_series(tmp_path / "series", orientation)
    cuts = HU_ZYX if orientation is AXIAL else HU_ZYX[::-1].transpose(1, 0, 2)  # along the slices
    shares = {"small": (cuts > 900) * 0.9, "Big-one": (cuts > 0) * np.where(cuts > 1200, 0.4, 0.6)}
    masks = shares if kind == "FRACTIONAL" else {name: share > 0.5 for name, share in shares.items()}
    segmentation, names = read_segmentation(write_segmentation(tmp_path / "seg", files, masks, kind))
    expected = np.where((HU_ZYX > 0) & (HU_ZYX <= 1200), 2, (HU_ZYX > 900) * 1)
    image = read_dicom_series(files)
    assert names == {1: "small", 2: "big_one"} and np.array_equal(on_grid(segmentation, image), expected)
    assert segmentation.affine is not None
    half_a_voxel, out_of_it = (nib.affines.from_matvec(np.eye(3), [shift, 0, 0]) for shift in (0.5, 1))
    wider = np.diag([1.02, 1, 1, 1])  # a third of a voxel at the end
    for change in (half_a_voxel, out_of_it, wider):
        with pytest.raises(DistsegError, match="lies on another grid"):
            on_grid(replace(segmentation, affine=segmentation.affine @ change), image)


def test_a_segmentation_of_some_slices_lies_where_its_image_says(tmp_path: Path) -> None:
    files = write_series(tmp_path / "series")
    lung = np.zeros(HU_ZYX.shape, bool)
    lung[1:4, 2:9, 3:12] = True
    infection = np.zeros(HU_ZYX.shape, bool)
    infection[2, 4:6, 5:7] = True
    path = write_segmentation(tmp_path / "seg.dcm", files, {"Lung": lung, "Ground-glass Opacity": infection})
    segmentation, names = read_segmentation(path)
    assert names == {1: "lung", 2: "ground_glass_opacity"} and len(segmentation.values_ZYX) == 3
    image = read_dicom_series(files)
    assert np.array_equal(on_grid(segmentation, image), np.where(infection, 2, lung))
    with pytest.raises(DistsegError, match="lies on another grid"):
        on_grid(segmentation, read_dicom_series(files[:1]))
    with pytest.raises(DistsegError, match="got DICOM of modality 'CT'; it must be SEG"):
        read_segmentation(files[0])


def write_dicom_set(src: Path, masks: str) -> None:
    """Two patients as images/<case>/ with lung masks in one of three formats."""
    for case in ("a", "b"):
        name = f"patient {case}"

        def of_patient(_: int, slice_: pydicom.Dataset, case: str = case, name: str = name) -> None:
            slice_.PatientID = name
            slice_.RescaleIntercept += case == "b"  # one image under two patients is refused

        files = write_series(src / "images" / case, change=of_patient)
        lung = HU_ZYX > 0
        folder = src / "lung"
        folder.mkdir(exist_ok=True)
        if masks == "nifti":  # in another axis order than the series
            nib.save(nib.Nifti1Image(lung[:, ::-1, ::-1].T.astype(np.uint8), np.array([[0.8, 0, 0, -12], [0, 0.7, 0, -7.7], [0, 0, 2.5, 0], [0, 0, 0, 1]])), folder / f"{case}.nii.gz")  # fmt: skip
        elif masks == "seg":
            write_segmentation(folder / f"{case}.dcm", files, {"anything": lung})
        else:
            (folder / case).mkdir()
            for path in files:
                z = round(float(pydicom.dcmread(path).ImagePositionPatient[2]) / SPACING_MM[0])
                Image.fromarray(lung[z].astype(np.uint8) * 255).save(folder / case / f"{path.name}.png")


@pytest.mark.parametrize("masks", ["nifti", "seg", "png"])
def test_series_with_masks_of_any_format_make_the_same_store(masks: str, tmp_path: Path) -> None:
    write_dicom_set(tmp_path / "src", masks)
    store, _ = prepare_store(tmp_path / "src", tmp_path / "store", FoldRule(2))
    assert [case.patient for case in store.cases] == ["patient a", "patient b"] and store.cases[0].intensity == "hu"
    hu_ZYX, label_ZYX = store.read_case(store.cases[0])
    assert np.array_equal(hu_ZYX, HU_ZYX // 2 * 2) and np.array_equal(label_ZYX, HU_ZYX > 0)
    assert store.cases[0].spacing_mm == SPACING_MM


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real CT data are not on this machine")
def test_real_slices_are_read_with_their_padding_as_air(tmp_path: Path) -> None:
    files = sorted((SHARED / "hu_samples").glob("*.dcm"))
    for case in ("one", "two"):
        (tmp_path / "src/images" / case).mkdir(parents=True)
        (tmp_path / "src/lung" / case).mkdir(parents=True)
        for path in files:
            image = pydicom.dcmread(path)
            image.PatientName = case  # the same file under two patients would be refused
            image.save_as(tmp_path / "src/images" / case / path.name)
            body = pydicom.dcmread(path).pixel_array
            mask = ((body > -950) & (body < -500)).astype(np.uint8) * 255
            Image.fromarray(mask).save(tmp_path / "src/lung" / case / f"{path.stem}.png")
    store, _ = prepare_store(tmp_path / "src", tmp_path / "store", FoldRule(2))
    hu_ZYX, label_ZYX = store.read_case(store.cases[0])
    assert (
        hu_ZYX.shape == (2, 512, 512) and store.cases[0].hu_range[0] == -1024 and store.cases[0].spacing_mm is not None
    )
    assert np.array_equal(label_ZYX, (hu_ZYX > -950) & (hu_ZYX < -500))
    below, above = sorted((pydicom.dcmread(path) for path in files), key=lambda image: image.ImagePositionPatient[2])
    assert np.array_equal(hu_ZYX, np.maximum([below.pixel_array, above.pixel_array], -1024))  # slope 1, intercept 0
