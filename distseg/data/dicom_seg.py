"""DICOM-SEG out: each region of a label map as a segment on the slices of the series that it was found in."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import generate_uid

from distseg import __version__
from distseg.data.dicom import Frame, series_affine, sorted_frames
from distseg.data.volume import as_stored, parsing
from distseg.errors import DistsegError
from distseg.files import written_aside
from distseg.pictures import colour_of_label
from distseg.regions import own_labels

SERIES_NUMBER = 100  # far above those that a scanner numbers its own with
MAKER = "distseg"
# Patient and study as the standard wants them in every image, empty or not; anonymisers drop them.
MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate", "StudyTime",
    "ReferringPhysicianName",
)  # fmt: skip
UTF_8 = "ISO_IR 192"
SHORT_STRING = 16  # characters that a code's value may have


@dataclass(frozen=True)
class Meaning:
    """What a segment is to a viewer: category and type of DICOM PS3.16 CID 7150 and 7151, and where it lies."""

    category: Code
    type: Code
    anatomy: tuple[Code, ...] = ()


ABNORMAL = codes.SCT.MorphologicallyAbnormalStructure
MEANINGS = {
    "lung": Meaning(codes.SCT.AnatomicalStructure, codes.SCT.Lung),
    # An infection's outline holds ground glass and consolidation alike: CID 7194 has one word for both.
    "infection": Meaning(ABNORMAL, codes.SCT.Inflammation, (codes.SCT.Lung,)),
    "ground_glass": Meaning(ABNORMAL, codes.DCM.GroundGlassOpacity, (codes.SCT.Lung,)),
    "consolidation": Meaning(ABNORMAL, Code("95436008", "SCT", "Lung consolidation"), (codes.SCT.Lung,)),
    "pleural_effusion": Meaning(ABNORMAL, codes.SCT.PleuralEffusion, (codes.SCT.Pleura,)),
}


def write_segmentation(
    path: Path, mask_ZYX: np.ndarray, files: Sequence[Path], regions: Mapping[str, Sequence[int]], weights: str
) -> None:
    """Writes a binary DICOM-SEG that references the series; nothing found makes segments without a pixel.

    Segments may overlap, as regions do: `lung` has the infected lung too. They are numbered in the order of `regions`, so that
    where a reader keeps the higher number, the label map comes back. Viewers show each in the colour that it has in our pictures.

    Args:
        path: file to write.
        mask_ZYX: uint8 label map of the series as `read_dicom_series` gives it.
        files: the series.
        regions: region -> its labels, wide regions first.
        weights: digest of the model's weights, which the file names.

    Raises:
        DistsegError: the series lacks what a reference to it needs.
    """
    frames = sorted_frames(files)
    stored_ZYX = as_stored(mask_ZYX, series_affine(frames)).T
    images, order = _sources(frames)
    segments = np.stack([np.isin(stored_ZYX[order], list(labels)) for labels in regions.values()], axis=-1)
    own = own_labels(regions)
    algorithm = hd.AlgorithmIdentificationSequence(
        MAKER, codes.DCM.ArtificialIntelligence, __version__, parameters={"weights_sha256": weights}
    )
    with parsing("dicom-seg of", files[0], "mend what it names in the series, or use --format nifti"):
        segmentation = hd.seg.Segmentation(
            source_images=images,
            pixel_array=segments,
            segmentation_type="BINARY",
            segment_descriptions=[
                _segment(n, name, colour_of_label(own[name]), algorithm) for n, name in enumerate(regions, start=1)
            ],
            series_instance_uid=generate_uid(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer=MAKER,
            manufacturer_model_name=MAKER,
            software_versions=__version__,
            device_serial_number=weights[:SHORT_STRING],
            content_label="SEGMENTATION",
            content_description="Regions that a network found",
            series_description=f"{MAKER}: {', '.join(regions)}"[:64],  # what the type holds
        )
    with written_aside(path) as aside:
        segmentation.save_as(aside)


def check_series(files: Sequence[Path]) -> None:
    """Finds out before a series is segmented that it cannot be referenced.

    Raises:
        DistsegError: it lacks what a reference to it needs.
    """
    _sources(sorted_frames(files))


def _sources(frames: Sequence[Frame]) -> tuple[list[pydicom.Dataset], list[int]]:
    """The images of a series, and which of its sorted frames the first, second ... frame of theirs is."""
    files = list(dict.fromkeys(frame.path for frame in frames))
    if 1 < len(files) < len(frames):
        raise DistsegError(
            f"dicom-seg of {files[0].parent}: got {len(files)} multi-frame files; it references slices, or one such file; "
            "use --format nifti"
        )
    images: list[pydicom.Dataset] = []
    for path in files:
        with parsing("dicom", path):
            image = pydicom.dcmread(path, stop_before_pixels=True)
            if isinstance(image.get("SpecificCharacterSet"), MultiValue):  # Japanese, ...: highdicom takes but one
                image.decode()
                image.SpecificCharacterSet = UTF_8
        for name in MAY_BE_EMPTY:
            image.setdefault(name, None)
        if not image.get("FrameOfReferenceUID"):
            raise DistsegError(
                f"dicom-seg of {path}: got no FrameOfReferenceUID, which says what its positions are of; use --format nifti"
            )
        images.append(image)
    order = range(len(frames)) if len(files) > 1 else np.argsort([frame.index for frame in frames]).tolist()
    return images, list(order)


def _segment(
    number: int, name: str, colour: str, algorithm: hd.AlgorithmIdentificationSequence
) -> hd.seg.SegmentDescription:
    meaning = MEANINGS.get(name) or Meaning(codes.SCT.Tissue, own_code(name))
    return hd.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=meaning.category,
        segmented_property_type=meaning.type,
        algorithm_type="AUTOMATIC",
        algorithm_identification=algorithm,
        anatomic_regions=meaning.anatomy or None,
        display_color=hd.color.CIELabColor.from_rgb(*bytes.fromhex(colour[1:])),
    )


def own_code(name: str) -> Code:
    """A code of distseg's own scheme, for a region that no code above says; the same name gives the same code."""
    value = re.sub(r"[^A-Z0-9]+", "_", name.upper())
    if value != name.upper() or len(value) > SHORT_STRING:
        value = hashlib.sha256(name.encode()).hexdigest()[:SHORT_STRING].upper()
    return Code(value, "99DISTSEG", name[:64])
