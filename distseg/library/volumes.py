"""What a program may give as a volume (a path, an image of nibabel or SimpleITK, an array), and a mask as the same kind."""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from distseg.data.file_kinds import IN_WORDS, is_dicom, is_picture, is_volume, series_files, what_it_is
from distseg.data.nifti import NOT_MM, write_nifti
from distseg.data.volume import LPS_TO_RAS, VOXEL_MM, Volume, as_stored, check_voxel_count, in_lps, parsing
from distseg.data.volume_files import read_volume
from distseg.errors import DistsegError

if TYPE_CHECKING:
    import SimpleITK


@dataclass(frozen=True)
class Given:
    """A volume, and how its mask becomes what the volume was given as."""

    volume: Volume
    as_given: Callable[[Volume], Any]
    """from the mask on the volume's grid"""


def take_volume(
    volume: "str | os.PathLike[str] | SpatialImage | SimpleITK.Image | np.ndarray", spacing_mm: Sequence[float] | None
) -> Given:
    """Reads or wraps a volume, whatever it is.

    Args:
        volume: see `SegmentationModel.segment`.
        spacing_mm: z, y, x of an array; None: not known.

    Raises:
        DistsegError: not readable, not one three-dimensional volume of real numbers, or a spacing that does not belong there.
    """
    if isinstance(volume, np.ndarray):
        return Given(_of_array(volume, spacing_mm), lambda mask: mask.values_ZYX)
    if spacing_mm is not None:
        raise DistsegError(f"spacing_mm: got it for {_kind(volume)}, which has its own; it is for arrays; leave it out")
    if isinstance(volume, (str, os.PathLike)):
        read = _of_path(Path(volume))
        return Given(read, as_nibabel if read.affine is not None else lambda mask: mask.values_ZYX)
    if isinstance(volume, SpatialImage):
        return Given(_of_nibabel(volume), as_nibabel)
    if type(volume).__module__.partition(".")[0] == "SimpleITK":
        return _of_simpleitk(volume)
    raise DistsegError(
        f"volume: got {_kind(volume)}; it must be a path, a nibabel or SimpleITK image, or a numpy array [Z, Y, X] of HU; "
        "convert it"
    )


def as_nibabel(mask: Volume) -> nib.Nifti1Image:
    """The image that `distseg predict` would write, in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.nii"
        write_nifti(path, mask.values_ZYX, mask)
        return type(nib.load(path)).from_bytes(path.read_bytes())


def _kind(volume: object) -> str:
    return (
        "a path" if isinstance(volume, (str, os.PathLike)) else f"{type(volume).__module__}.{type(volume).__qualname__}"
    )


def _of_path(path: Path) -> Volume:
    files: tuple[Path, ...] = (path,)
    if path.is_dir():
        files, _ = series_files(path)
        if not files:
            raise DistsegError(
                f"volume: got folder {path} without a DICOM file; it must hold one series; give a file, or run `distseg predict` "
                "for a folder of volumes"
            )
    elif not (is_volume(path) or is_picture(path) or is_dicom(path)):
        rule = (
            (what_it_is(path) or f"no {IN_WORDS}; convert it")
            if path.exists()
            else "no such file or folder; check the path"
        )
        raise DistsegError(f"volume: got {path}; {rule}")
    return read_volume(files)


def _of_array(values_ZYX: np.ndarray, spacing_mm: Sequence[float] | None) -> Volume:
    path = Path("array")
    _check_values(path, values_ZYX)
    if spacing_mm is None:
        return Volume(path, values_ZYX, None, None)
    sizes_mm = tuple(spacing_mm) if isinstance(spacing_mm, (Sequence, np.ndarray)) else (spacing_mm,)
    if len(sizes_mm) != 3 or not all(isinstance(mm, (int, float, np.number)) and _is_size(mm) for mm in sizes_mm):
        raise DistsegError(
            f"spacing_mm: got {spacing_mm!r}; it must be three sizes of a voxel in mm, z, y and x; give e.g. (2.5, 0.7, 0.7)"
        )
    z_mm, y_mm, x_mm = (float(mm) for mm in sizes_mm)
    affine = np.diag([-x_mm, -y_mm, z_mm, 1.0])
    return Volume(path, values_ZYX, (z_mm, y_mm, x_mm), affine, affine)


def _is_size(mm: float) -> bool:
    return math.isfinite(mm) and VOXEL_MM[0] <= mm <= VOXEL_MM[1]


def _of_nibabel(image: SpatialImage) -> Volume:
    path = Path(image.get_filename() or "nibabel image")
    if image.affine is None or not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise DistsegError(f"volume {path}: got affine {image.affine}; it must be invertible; mend the image")
    if not isinstance(image, nib.Nifti1Image):
        image = nib.Nifti1Image.from_image(image)
    if unit := NOT_MM.get(int(image.header["xyzt_units"]) & 7):
        raise DistsegError(f"volume {path}: got voxel sizes in {unit}; CT's are in mm; mend the header (xyzt_units)")
    with parsing("volume", path):
        values = np.asanyarray(image.dataobj)
    if all(n == 1 for n in values.shape[3:]):
        values = values.reshape(values.shape[:3])
    _check_values(path, values)
    return replace(in_lps(path, values, image.affine), header=image.header)


def _of_simpleitk(image: "SimpleITK.Image") -> Given:
    import SimpleITK as sitk  # whoever gives its image has it

    path = Path("SimpleITK image")
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise DistsegError(
            f"volume {path}: got {image.GetDimension()} dimensions of {image.GetNumberOfComponentsPerPixel()} values; it must be "
            "three-dimensional with one value a voxel; take one volume out of it"
        )
    values = sitk.GetArrayFromImage(image)  # last axis first
    _check_values(path, values)
    origin, spacing, direction = image.GetOrigin(), image.GetSpacing(), image.GetDirection()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(direction, (3, 3)) * spacing
    affine[:3, 3] = origin
    affine = LPS_TO_RAS @ affine

    def as_given(mask: Volume) -> "SimpleITK.Image":
        written = sitk.GetImageFromArray(np.ascontiguousarray(as_stored(mask.values_ZYX, affine).T))
        written.SetOrigin(origin)
        written.SetSpacing(spacing)
        written.SetDirection(direction)
        return written

    return Given(in_lps(path, values.T, affine), as_given)


def _check_values(path: Path, values: np.ndarray) -> None:
    if values.ndim != 3:
        raise DistsegError(
            f"volume {path}: got shape {values.shape}; it must be three-dimensional; give one volume, of one slice [None]"
        )
    if values.dtype.kind not in "iuf":
        raise DistsegError(f"volume {path}: got voxels of type {values.dtype}; they must be real numbers; convert it")
    check_voxel_count(path, values.shape)
