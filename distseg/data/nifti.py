"""NIfTI volumes in and masks out, in one orientation.

Inside distseg a volume is an array [Z, Y, X] with x growing to the patient's Left, y to Posterior, z to Superior, so that
a slice [Y, X] shows as a radiologist sees it. Files may have any of the 48 axis orders; masks go back to theirs.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from distseg.errors import DistsegError
from distseg.files import written_aside

SUFFIXES = (".nii.gz", ".nii")
LPS = axcodes2ornt(("L", "P", "S"))
MAX_VOXELS = 2**31  # 4 GiB of int16: far above any chest CT, far below what a broken header may claim
GREY_WINDOW_HU = (-1250, 250)  # what grey 0..255 stands for in the radiopaedia_* volumes of Zenodo 3757476


@dataclass(frozen=True)
class Volume:
    """A volume as read, with what is needed to write a mask beside it."""

    path: Path
    values_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float]  # z, y, x
    affine: np.ndarray  # of the file, 4 x 4


def is_nifti(path: Path) -> bool:
    return path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def nifti_stem(path: Path) -> str:
    """File name without .nii or .nii.gz."""
    return path.name.removesuffix(".gz").removesuffix(".nii")


def read_volume(path: Path) -> Volume:
    """Reads a three-dimensional NIfTI file into [Z, Y, X], LPS.

    Raises:
        DistsegError: no such file, not NIfTI, truncated, not three-dimensional, too large, without a usable affine or
            with values that are not finite.
    """
    image = _open(path)
    if len(image.shape) != 3 or 0 in image.shape:
        raise DistsegError(f"volume {path}: got shape {image.shape}; it must be three-dimensional and not empty")
    if np.prod(image.shape, dtype=np.float64) > MAX_VOXELS:
        raise DistsegError(
            f"volume {path}: got shape {image.shape}; at most {MAX_VOXELS} voxels; the header may be broken"
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise DistsegError(f"volume {path}: got affine {image.affine.tolist()}; it must be invertible; mend the header")
    values = _voxels(image, path)
    orientation = ornt_transform(io_orientation(image.affine), LPS)
    values_XYZ = apply_orientation(values, orientation)
    spacing_xyz = np.empty(3)
    spacing_xyz[orientation[:, 0].astype(int)] = voxel_sizes(image.affine)
    z_mm, y_mm, x_mm = (round(float(mm), 6) for mm in spacing_xyz[::-1])
    return Volume(path, np.ascontiguousarray(values_XYZ.T), (z_mm, y_mm, x_mm), image.affine)


def write_mask(path: Path, mask_ZYX: np.ndarray, like: Volume) -> None:
    """Writes a uint8 mask with the shape, axis order and affine of the volume it was predicted from."""
    back = ornt_transform(LPS, io_orientation(like.affine))
    image = nib.Nifti1Image(apply_orientation(mask_ZYX.T, back).astype(np.uint8), like.affine)
    with written_aside(path) as aside:
        nib.save(image, aside)


def hounsfield(volume: Volume, intensity: str = "auto") -> tuple[np.ndarray, str]:
    """The volume in HU, and where its intensities came from.

    Air makes every CT in HU go far below 0, so a volume within 0..255 is grey of the window [-1250, 250] HU.

    Args:
        volume: as read.
        intensity: "auto" (decide as above), "hu" or "grey" (refuse a volume that contradicts it).

    Returns:
        int16 [Z, Y, X], and "hu" or "grey_-1250_250".

    Raises:
        DistsegError: `intensity` contradicts the values.
    """
    low, high = float(volume.values_ZYX.min()), float(volume.values_ZYX.max())
    looks_grey = low >= 0 and high <= 255
    if intensity == "grey" and not looks_grey or intensity == "hu" and looks_grey:
        seen = "grey" if looks_grey else "hu"
        raise DistsegError(
            f"volume {volume.path}: got values {low:g}..{high:g}, declared {intensity}; they look like {seen}; "
            f"use --intensity {seen} or auto"
        )
    if not looks_grey:
        return np.clip(np.rint(volume.values_ZYX), -32768, 32767).astype(np.int16), "hu"
    low_hu, high_hu = GREY_WINDOW_HU
    hu = volume.values_ZYX.astype(np.float32) / 255 * (high_hu - low_hu) + low_hu
    return np.rint(hu).astype(np.int16), f"grey_{low_hu}_{high_hu}"


def _open(path: Path) -> nib.Nifti1Image:
    if not path.is_file():
        raise DistsegError(f"volume: got {path}; no such file; check the path")
    try:
        image = nib.load(path)
    except (ImageFileError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DistsegError(f"volume {path}: not a readable NIfTI file ({error}); copy or download it again") from None
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is one too
        raise DistsegError(f"volume {path}: got {type(image).__name__}; it must be NIfTI; convert it")
    return image


def _voxels(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DistsegError(f"volume {path}: truncated or damaged ({error}); copy or download it again") from None
    if values.dtype.kind not in "iuf":
        raise DistsegError(f"volume {path}: got voxels of type {values.dtype}; they must be real numbers; convert it")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DistsegError(f"volume {path}: holds NaN or infinite values; HU are finite; mend or leave out the volume")
    return values
