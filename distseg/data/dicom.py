"""DICOM in: CT series (one file a slice, or enhanced multi-frame) and DICOM-SEG masks. pydicom and highdicom do the parsing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from distseg.config import AIR_HU
from distseg.data.label_names import as_label
from distseg.data.volume import GRID_TOLERANCE, LPS_TO_RAS, Volume, check_voxel_count, in_lps, parsing
from distseg.errors import DistsegError

CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
NEEDED = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
# Functional groups of an enhanced file that hold them, a frame's own or shared.
GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
AXIAL = (1, 0, 0, 0, 1, 0)  # rows to the Left, columns to Posterior
GAP_TOLERANCE = 0.05  # of the distance of slices
ROUNDING_MM = 0.11  # how much further two slices may lie whose positions were rounded to 0.1 mm
TILT_TOLERANCE_MM = 0.2  # that a stack of slices may shift sideways as a whole
LARGEST = 1e6  # mm or HU: above all that a CT holds, below what overflows
CONFIDENT = 0.5  # of a fractional segmentation


@dataclass(frozen=True)
class Frame:
    """One slice of a series: where it is and how its values become HU."""

    path: Path
    index: int
    """in its file"""
    shape: tuple[int, int]
    """rows, columns"""
    position_mm: np.ndarray
    """of the first pixel's centre, to Left, Posterior, Superior"""
    orientation: np.ndarray
    """(2, 3): directions along a row and down a column"""
    spacing_mm: tuple[float, float]
    """between rows, between columns"""
    thickness_mm: float | None
    slope: float
    intercept: float
    padding: tuple[int, int] | None
    """the two ends of the stored values that are no measurement"""
    is_deflated: bool
    """the whole file is compressed, not its pixels: no frame can be read alone"""


def read_patient_id(path: Path) -> str | None:
    """PatientID of a file, None where it has none."""
    with parsing("dicom", path):
        dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(dataset.get("PatientID") or "").strip() or None


def read_dicom_series(files: Sequence[Path]) -> Volume:
    """A CT series in HU; its files may come in any order.

    Padding becomes air. The distance of slices is that of their positions (SpacingBetweenSlices or SliceThickness for one).

    Raises:
        DistsegError: no CT, several series, slices that are missing, double, of different size or orientation or shifted
            by a gantry tilt, no rescale values, no position, or damaged or compressed by a method that is not installed.
    """
    frames = sorted_frames(files)
    first = frames[0]
    folder = first.path if len(files) == 1 else first.path.parent
    check_voxel_count(folder, (len(frames), *first.shape))
    return in_lps(folder, np.stack([_hounsfield(frame) for frame in frames]).T, series_affine(frames))


def series_affine(frames: Sequence[Frame]) -> np.ndarray:
    """4 x 4, (column, row, frame) of a sorted series -> mm to the Right, Anterior, Superior."""
    row, column = frames[0].orientation
    row_mm, column_mm = frames[0].spacing_mm
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * column_mm, column * row_mm
    affine[:3, 2] = np.cross(row, column) * _slice_distance(frames)
    affine[:3, 3] = frames[0].position_mm
    return LPS_TO_RAS @ affine


def axial_order(files: Sequence[Path]) -> list[Path]:
    """The files of an axial series from Inferior to Superior: the order that masks of the same names stack in.

    Raises:
        DistsegError: as `read_dicom_series`; or it is not axial, so that pictures of its slices do not lie as they show.
    """
    frames = sorted_frames(files)
    if not np.allclose(frames[0].orientation.ravel(), AXIAL, atol=1e-3):
        raise DistsegError(
            f"dicom {frames[0].path}: got orientation {frames[0].orientation.ravel().tolist()}; PNG masks need an axial "
            "series; give the masks as NIfTI or DICOM-SEG"
        )
    return [frame.path for frame in frames]


def read_segmentation(path: Path, over: Callable[[str], int] | None = None) -> tuple[Volume, dict[int, str]]:
    """A DICOM-SEG: a binary, fractional (from one half) or label map one.

    Args:
        path: of the file.
        over: a number for each label: higher ones lie over lower ones. None: the segments' own numbers.

    Returns:
        Segment numbers on the grid that the file has (only slices with segments, often); where segments overlap one is kept. And
        each segment's label, lower case, words joined by `_`.

    Raises:
        DistsegError: not a DICOM-SEG, or damaged.
    """
    import highdicom as hd  # slow to import, and few need it

    with parsing("dicom", path):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if header.get("Modality") != "SEG":
            raise DistsegError(
                f"mask {path}: got DICOM of modality {str(header.get('Modality'))!r:.80}; it must be SEG; convert it"
            )
        check_voxel_count(path, (int(header.get("NumberOfFrames", 1)), int(header.Rows), int(header.Columns)))
        segmentation = hd.seg.segread(path)
        numbers = [int(number) for number in segmentation.segment_numbers if number]
        names = {n: as_label(segmentation.get_segment_description(n).segment_label) for n in numbers}
        grid = segmentation.get_volume_geometry(rtol=GAP_TOLERANCE, allow_missing_positions=True)
        if grid is None:
            raise DistsegError(f"mask {path}: got slices at uneven distances; a volume has one; resample it")
        check_voxel_count(path, grid.spatial_shape)
        in_order = sorted(numbers, key=lambda n: (over(names[n]) if over else n, n))
        label_ZYX = _segment_numbers(segmentation, in_order, grid.spatial_shape)
        affine = LPS_TO_RAS @ grid.affine[:, [2, 1, 0, 3]]  # highdicom counts slice, row, column
    return in_lps(path, label_ZYX.T, affine), names


def on_grid(segmentation: Volume, image: Volume) -> np.ndarray:
    """A segmentation's values on the grid of the image that holds it: [Z, Y, X], 0 where it says nothing.

    Raises:
        DistsegError: it lies on another grid, or reaches out of the image.
    """
    offset = None
    if segmentation.affine is not None and image.affine is not None:
        to_image = np.linalg.inv(image.affine) @ segmentation.affine
        corners = np.array([*np.ndindex(2, 2, 2)]) * (np.array(segmentation.values_ZYX.shape[::-1]) - 1)
        away = corners @ to_image[:3, :3].T + to_image[:3, 3] - corners
        if np.abs(away - np.rint(away[0])).max() <= GRID_TOLERANCE:
            offset = np.rint(away[0]).astype(int)[::-1]
    if offset is None or (offset < 0).any() or (offset + segmentation.values_ZYX.shape > image.values_ZYX.shape).any():
        raise DistsegError(
            f"mask {segmentation.path}: lies on another grid than {image.path}; image and mask must share one; resample it"
        )
    values_ZYX = np.zeros(image.values_ZYX.shape, segmentation.values_ZYX.dtype)
    box = tuple(slice(o, o + n) for o, n in zip(offset, segmentation.values_ZYX.shape, strict=True))
    values_ZYX[box] = segmentation.values_ZYX
    return values_ZYX


def _segment_numbers(segmentation: Any, numbers: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Label map in highdicom's order of slices, later numbers over earlier ones; fractions are read one after the other."""
    kind = segmentation.SegmentationType
    if kind == "LABELMAP" or kind == "BINARY" and list(numbers) == sorted(numbers):
        return segmentation.get_volume(combine_segments=True, skip_overlap_checks=True, rtol=GAP_TOLERANCE).array
    label_ZYX = np.zeros(shape, np.uint16)
    for number in numbers:
        held = segmentation.get_volume(segment_numbers=[number], rtol=GAP_TOLERANCE).array[..., 0]
        label_ZYX[held >= (CONFIDENT if kind == "FRACTIONAL" else 1)] = number
    return label_ZYX


def sorted_frames(files: Sequence[Path]) -> list[Frame]:
    """All frames of the files along their normal, as one regular stack."""
    frames: list[Frame] = []
    series: dict[str, str] = {}
    for path in files:
        with parsing("dicom", path):
            header = pydicom.dcmread(path, stop_before_pixels=True)
            uid, description = (str(header.get(name) or "") for name in ("SeriesInstanceUID", "SeriesDescription"))
            series.setdefault(uid, f"{uid!r:.80} {description!r:.80}, as {path.name}")
            _check_ct(path, header)
            frames += _frames(path, header)
    if len(series) > 1:
        some = "; ".join(list(series.values())[:3])
        raise DistsegError(
            f"dicom {files[0].parent}: got {len(series)} series ({some}{'; ...' if len(series) > 3 else ''}); a folder holds "
            "one; move each to its own"
        )
    if not frames:
        raise DistsegError(f"dicom {[*map(str, files)]}: got no frame; a series holds slices; leave it out")
    return _checked_stack(frames)


def _check_ct(path: Path, header: Any) -> None:
    sop_class = header.get("SOPClassUID")
    if sop_class not in CT_CLASSES:
        name = str(getattr(sop_class, "name", sop_class))
        raise DistsegError(f"dicom {path}: got {name!r:.80}; it must be a CT image; move it out of the series' folder")
    if "LOCALIZER" in (header.get("ImageType") or ()):
        raise DistsegError(f"dicom {path}: got a localizer (scout) image; move it out of the series' folder")
    if header.get("SamplesPerPixel", 1) != 1:
        raise DistsegError(f"dicom {path}: got colours; CT has one value a pixel; leave it out")
    syntax = header.file_meta.TransferSyntaxUID
    if syntax.is_compressed and not _has_decoder(syntax):
        raise DistsegError(
            f"dicom {path}: got {syntax.name!r:.120} compression; no installed package decodes it; decompress it (gdcmconv --raw), "
            "or install pylibjpeg[all]"
        )


def _has_decoder(syntax: Any) -> bool:
    try:
        return get_decoder(syntax).is_available
    except NotImplementedError:
        return False


def _frames(path: Path, header: Any) -> list[Frame]:
    """What a header says of each frame; enhanced files keep it in functional groups, shared or a frame's own."""
    own_groups = header.get("PerFrameFunctionalGroupsSequence", [header])
    declared = int(header.get("NumberOfFrames") or 1)
    if declared != len(own_groups):
        raise DistsegError(
            f"dicom {path}: got {declared} frames and the positions of {len(own_groups)}; each has its own; convert it again"
        )
    if own_groups[0] is header:
        return [_frame(path, 0, header, [header])]
    shared = list(header.get("SharedFunctionalGroupsSequence") or [])
    return [
        _frame(
            path, index, header, [group for name in GROUPS for every in (own, *shared) for group in every.get(name, ())]
        )
        for index, own in enumerate(own_groups)
    ]


def _frame(path: Path, index: int, header: Any, groups: Sequence[Any]) -> Frame:
    """A frame from the data sets that may describe it, the first that does winning."""

    def first(name: str) -> Any:
        return next((group.get(name) for group in groups if group.get(name) is not None), None)

    values = {name: first(name) for name in NEEDED}
    if missing := [name for name, value in values.items() if value is None]:
        raise DistsegError(
            f"dicom {path}: got no {missing[0]}; it says where voxels lie or what they measure; convert it again"
        )
    low = header.get("PixelPaddingValue")
    high = header.get("PixelPaddingRangeLimit", low)
    heights = [float(mm) for name in ("SpacingBetweenSlices", "SliceThickness") if (mm := first(name)) is not None]
    row_mm, column_mm = (float(mm) for mm in values["PixelSpacing"])
    frame = Frame(
        path=path,
        index=index,
        shape=(int(header.Rows), int(header.Columns)),
        position_mm=np.array(values["ImagePositionPatient"], float).reshape(3),
        orientation=np.array(values["ImageOrientationPatient"], float).reshape(2, 3),
        spacing_mm=(row_mm, column_mm),
        thickness_mm=next((mm for mm in heights if mm > 0), None),  # some scanners count slices downwards
        slope=float(values["RescaleSlope"]),
        intercept=float(values["RescaleIntercept"]),
        padding=None if low is None else (int(low), int(high)),
        is_deflated=header.file_meta.TransferSyntaxUID.is_deflated,
    )
    numbers = [*frame.position_mm, *frame.orientation.ravel(), row_mm, column_mm, frame.slope, frame.intercept]
    if not np.abs(numbers).max() < LARGEST or min(row_mm, column_mm) <= 0 or frame.slope == 0:  # NaN is not below
        absurd = {name: np.array(value).astype(float).tolist() for name, value in values.items()}
        raise DistsegError(f"dicom {path}: got absurd values ({absurd}); they say where voxels lie; convert it again")
    if not np.allclose(frame.orientation @ frame.orientation.T, np.eye(2), atol=1e-3):
        raise DistsegError(f"dicom {path}: got directions that are not at right angles; convert it again")
    return frame


def _checked_stack(frames: Sequence[Frame]) -> list[Frame]:
    first = frames[0]
    for frame in frames:
        for what in ("shape", "spacing_mm", "orientation"):
            if not np.allclose(getattr(frame, what), getattr(first, what), atol=1e-3):
                raise DistsegError(
                    f"dicom {frame.path}: got another {what.removesuffix('_mm')} than {first.path.name}; slices of a volume "
                    "agree; move it to a folder of its own"
                )
    normal = np.cross(*first.orientation)
    ordered = sorted(frames, key=lambda frame: float(frame.position_mm @ normal))
    positions = np.array([frame.position_mm for frame in ordered])
    along = positions @ normal
    sideways = positions - np.outer(along, normal)
    if np.abs(sideways - sideways[0]).max() > TILT_TOLERANCE_MM:
        raise DistsegError(
            f"dicom {ordered[-1].path}: its slices shift sideways (a gantry tilt); a volume's slices lie straight above each "
            "other; correct the tilt first (dcm2niix does)"
        )
    steps = np.diff(along)
    usual = float(np.median(steps)) if len(steps) else 0.0
    tolerance = max(GAP_TOLERANCE * usual, min(ROUNDING_MM, usual / 4))
    for below, step in enumerate(steps):
        if step < 1e-3:
            raise DistsegError(
                f"dicom {ordered[below + 1].path}: lies at the same place as {ordered[below].path.name}; each slice comes "
                "once; remove one"
            )
        if abs(step - usual) > tolerance:
            raise DistsegError(
                f"dicom {ordered[below + 1].path}: lies {step:.2f} mm above {ordered[below].path.name}, others "
                f"{usual:.2f} mm; slices may be missing; complete the series"
            )
    return ordered


def _slice_distance(frames: Sequence[Frame]) -> float:
    first, last = frames[0], frames[-1]
    if len(frames) > 1:
        return float(np.linalg.norm(last.position_mm - first.position_mm)) / (len(frames) - 1)
    if not first.thickness_mm or not 0 < first.thickness_mm < LARGEST:
        raise DistsegError(f"dicom {first.path}: got one slice without SliceThickness; a volume has a height; add it")
    return first.thickness_mm


def _hounsfield(frame: Frame) -> np.ndarray:
    with parsing("dicom", frame.path):
        source = pydicom.dcmread(frame.path) if frame.is_deflated else frame.path
        stored_YX = pixel_array(source, index=frame.index)
    if stored_YX.shape != frame.shape:
        raise DistsegError(f"dicom {frame.path}: got {stored_YX.shape} pixels, declared {frame.shape}; copy it again")
    hu_YX = stored_YX.astype(np.float32) * np.float32(frame.slope) + np.float32(frame.intercept)
    if frame.padding is not None:
        # In the stored type: scanners declare -2000 as the unsigned 63536.
        low, high = np.sort(np.array(frame.padding).astype(stored_YX.dtype))
        hu_YX[(stored_YX >= low) & (stored_YX <= high)] = AIR_HU
    return hu_YX
