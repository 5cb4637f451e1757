"""Volumes of files, whatever their format: the one door to readers and writers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from distseg.data.dicom import read_dicom_series
from distseg.data.file_kinds import METAIMAGE, NRRD, PICTURES, is_picture, is_volume
from distseg.data.metaimage import read_metaimage, write_metaimage
from distseg.data.nifti import read_nifti, write_nifti
from distseg.data.nrrd_files import read_nrrd, write_nrrd
from distseg.data.slice_pictures import read_pictures, write_picture
from distseg.data.volume import Volume
from distseg.errors import DistsegError


def read_volume(files: Sequence[Path], *, is_mask: bool = False) -> Volume:
    """A volume or a mask as it is stored.

    Args:
        files: one that holds it whole, its slices as pictures in their order, or the DICOM files of a series.
        is_mask: see `read_pictures`.

    Raises:
        DistsegError: it cannot be read; see the readers.
    """
    try:
        if is_volume(files[0]):
            return _reader(files[0])(files[0])
        return read_pictures(files, is_mask=is_mask) if is_picture(files[0]) else read_dicom_series(files)
    except OSError as error:
        raise DistsegError(f"volume {files[0]}: not readable ({error.strerror}); check the path") from None


def write_volume(
    path: Path, values_ZYX: np.ndarray, volume: Volume, scale: float = 1.0, labels: Mapping[str, int] | None = None
) -> None:
    """Writes a mask, or a map of probabilities, where its volume lies, in the axis order of the volume's file.

    Args:
        path: whose suffix says the format: .nii.gz, .nii, .mha, .mhd, .nrrd, .seg.nrrd; of pictures .png for one slice, .tif.
        values_ZYX: uint8 or float32.
        volume: as it was read.
        scale: what readers of NIfTI multiply the values with.
        labels: names of a mask's numbers, which .seg.nrrd keeps.
    """
    name = path.name.lower()
    if name.endswith(PICTURES):
        write_picture(path, values_ZYX)
    elif name.endswith(METAIMAGE):
        write_metaimage(path, values_ZYX, volume)
    elif name.endswith(NRRD):
        write_nrrd(path, values_ZYX, volume, labels or {})
    else:
        write_nifti(path, values_ZYX, volume, scale)


def _reader(path: Path) -> Callable[[Path], Volume]:
    name = path.name.lower()
    return read_metaimage if name.endswith(METAIMAGE) else read_nrrd if name.endswith(NRRD) else read_nifti
