"""Volumes of files, whatever their format: the one door to the readers."""

from collections.abc import Sequence
from pathlib import Path

from distseg.data.dicom import read_dicom_series
from distseg.data.file_kinds import is_picture, is_volume
from distseg.data.nifti import read_nifti
from distseg.data.slice_pictures import read_pictures
from distseg.data.volume import Volume
from distseg.errors import DistsegError


def read_volume(files: Sequence[Path]) -> Volume:
    """A volume or a mask as it is stored.

    Args:
        files: one that holds it whole, its slices as pictures in their order, or the DICOM files of a series.

    Raises:
        DistsegError: it cannot be read; see the readers.
    """
    try:
        if is_volume(files[0]):
            return read_nifti(files[0])
        return read_pictures(files) if is_picture(files[0]) else read_dicom_series(files)
    except OSError as error:
        raise DistsegError(f"volume {files[0]}: not readable ({error.strerror}); check the path") from None
