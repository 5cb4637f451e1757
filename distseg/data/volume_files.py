"""Volumes of files, whatever their format: the one door to readers and writers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distseg.data.dicom import read_dicom_series
from distseg.data.file_kinds import NIFTI, SEGMENTATION, TIFF, is_picture, is_volume
from distseg.data.metaimage import read_metaimage, write_metaimage
from distseg.data.nifti import read_nifti, write_nifti
from distseg.data.nrrd import read_nrrd, write_nrrd
from distseg.data.slice_pictures import read_mask_pictures, read_pictures, write_pictures
from distseg.data.volume import Volume, whole_labels
from distseg.errors import DistsegError

METAIMAGE = (".mha", ".mhd")


def read_volume(files: Sequence[Path]) -> Volume:
    """A volume as it is stored.

    Args:
        files: one that holds it whole, its slices as pictures in their order, or the DICOM files of a series.

    Raises:
        DistsegError: it cannot be read; see the readers.
    """
    try:
        if is_volume(files[0]):
            return _read_whole(files[0])
        return read_pictures(files) if is_picture(files[0]) else read_dicom_series(files)
    except OSError as error:
        raise DistsegError(f"volume {files[0]}: not readable ({error.strerror}); check the path") from None


def read_label_map(files: Sequence[Path]) -> Volume:
    """A mask, whose values are whole numbers; pictures of JPEG and of one colour are two-valued.

    Args:
        files: as of `read_volume`.

    Raises:
        DistsegError: as `read_volume`; or values between whole numbers.
    """
    mask = read_mask_pictures(files) if is_picture(files[0]) else read_volume(files)
    return replace(mask, values_ZYX=whole_labels(files[0], mask.values_ZYX))


def write_volume(
    files: Sequence[Path],
    values_ZYX: np.ndarray,
    volume: Volume,
    scale: float = 1.0,
    labels: Mapping[str, int] | None = None,
) -> None:
    """Writes a mask, or a map of probabilities, where its volume lies, in the format that the name says.

    Args:
        files: one of NIfTI, .mha, .mhd, .nrrd or a TIFF; or as many PNG files as there are slices.
        values_ZYX: uint8 or float32.
        volume: as it was read.
        scale: what readers multiply the values with; NIfTI alone can say it.
        labels: names of a mask's values, which .seg.nrrd keeps.
    """
    path = files[0]
    name = path.name.lower()
    if name.endswith(NIFTI):
        write_nifti(path, values_ZYX, volume, scale)
    elif name.endswith(METAIMAGE):
        write_metaimage(path, values_ZYX, volume)
    elif name.endswith(".nrrd"):
        write_nrrd(path, values_ZYX, volume, labels if name.endswith(SEGMENTATION) else None)
    else:
        write_pictures(files, values_ZYX)


def _read_whole(path: Path) -> Volume:
    name = path.name.lower()
    if name.endswith(NIFTI):
        return read_nifti(path)
    if name.endswith(METAIMAGE):
        return read_metaimage(path)
    return read_pictures([path]) if name.endswith(TIFF) else read_nrrd(path)
