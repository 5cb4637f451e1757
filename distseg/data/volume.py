"""A volume as every reader gives it, and its intensities as Hounsfield units.

Inside distseg a volume is an array [Z, Y, X] with x growing to the patient's Left, y to Posterior, z to Superior, so that
a slice [Y, X] shows as a radiologist sees it.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from distseg.config import AIR_HU
from distseg.errors import DistsegError

MAX_VOXELS = 2**31  # 4 GiB of int16: far above any chest CT, far below what a broken header may claim
GREY_WINDOW_HU = (-1250, 250)  # what grey 0..255 stands for in the radiopaedia_* volumes of Zenodo 3757476
PARSING = threading.RLock()  # filters of warnings and levels of loggers are those of all threads
# SimpleITK, DICOM and most formats count to the Left and Posterior, NIfTI to the other sides.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
LPS = axcodes2ornt(("L", "P", "S"))
VOXEL_MM = (1e-6, 1e6)  # sizes that a header in any unit may mean
RIGHT_ANGLED = 0.999  # of the product of its sides: the least volume of a voxel, 2.6 degrees of tilt
WHOLE = 1e-3  # how far rounding may take a label from its whole number: scaled by 1/255, interpolated by 0
GRID_TOLERANCE = 0.1  # of a voxel, at the corners of two volumes on one grid: headers round positions
HIGHEST_HU = 32767  # what int16 holds; dense metal stays below it
TISSUE_AND_AIR_HU = (-200, 300)  # a CT has values below the first, lung or air, and spans more than the second
USUAL_OFFSETS = (1024, 32768)  # of HU that are stored without a sign: of 12 bits, of 16
GREY_RESAMPLED = (-64, 320)  # how far a spline may leave grey 0..255


@dataclass(frozen=True)
class Volume:
    """A volume or a mask, in one orientation."""

    path: Path
    """the file, or the folder of a series: what messages name"""
    values_ZYX: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    """z, y, x; None: the source does not say (PNG)"""
    affine: np.ndarray | None
    """4 x 4, index (x, y, z) of values_ZYX -> mm to the Right, Anterior, Superior as in NIfTI; None as above"""
    stored_affine: np.ndarray | None = None
    """the same from an index of the array in the file, whose axes may have any order; None as above"""
    header: Any = None
    """of the file, for the writer of its own format; None: a format that distseg does not write so"""
    notes: tuple[str, ...] = ()
    """what a user should know of how it was read"""


def in_lps(path: Path, values_XYZ: np.ndarray, affine: np.ndarray) -> Volume:
    """A volume from an array in any of the 48 axis orders.

    Args:
        path: what messages name.
        values_XYZ: first, second and third axis as the file has them.
        affine: 4 x 4, index -> mm to the Right, Anterior, Superior.

    Raises:
        DistsegError: voxels of no size, or of an absurd one.
    """
    sizes_mm = voxel_sizes(affine)
    if not VOXEL_MM[0] <= sizes_mm.min() <= sizes_mm.max() <= VOXEL_MM[1]:
        raise DistsegError(f"volume {path}: got voxels of {sizes_mm.tolist()} mm; no CT has such; mend the header")
    share = abs(float(np.linalg.det(affine[:3, :3]))) / float(np.prod(sizes_mm))
    if share < RIGHT_ANGLED:
        raise DistsegError(
            f"volume {path}: got axes that are not at right angles (a gantry tilt; a voxel has {100 * share:.1f} % of the volume that "
            "its sides say); masks, millilitres and distances would be wrong; resample it to a straight grid"
        )
    orientation = ornt_transform(io_orientation(affine), LPS)
    turned = affine @ inv_ornt_aff(orientation, values_XYZ.shape)
    x_mm, y_mm, z_mm = (round(float(mm), 6) for mm in voxel_sizes(turned))
    values_ZYX = np.ascontiguousarray(apply_orientation(values_XYZ, orientation).T)
    return Volume(path, values_ZYX, (z_mm, y_mm, x_mm), turned, affine)


def as_stored(values_ZYX: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Values in the axis order of the array that `in_lps` made them from with that affine."""
    return apply_orientation(values_ZYX.T, ornt_transform(LPS, io_orientation(affine)))


@contextlib.contextmanager
def parsing(what: str, path: Path, remedy: str = "copy or download it again") -> Iterator[None]:
    """Turns whatever a damaged file makes a parser raise, log or warn into one line."""
    try:
        with PARSING, _silence():
            yield
    except DistsegError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DistsegError(f"{what} {path}: damaged or not readable ({reason}); {remedy}") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("nibabel.global", "pydicom", "highdicom")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)  # their modules' loggers too, which `disabled` would not silence
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_voxel_count(path: Path, shape: tuple[int, ...]) -> None:
    """Refuses what a header claims before memory is asked for."""
    if not shape or min(shape) < 1 or np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise DistsegError(
            f"volume {path}: got shape {tuple(shape)}; it must hold 1 to {MAX_VOXELS} voxels; the header may be broken"
        )


def hounsfield(volume: Volume, intensity: str = "auto", hu_offset: int | None = None) -> tuple[np.ndarray, str]:
    """The volume in HU, and where its intensities came from.

    A volume within 0..255 is grey of the window [-1250, 250] HU. HU are known by air and tissue: values below -200, and a range
    above 300. Values below air are what scanners and converters pad with (-2000, -2048, -3024, ...): they become air.
    export/cpp/volume.cpp follows the same rules; tests/serving/test_cpp.py feeds both the same files.

    Args:
        volume: as read.
        intensity: "auto" (decide as above); "hu": also what has no air or no tissue; "grey": also what resampling has left a
            little outside 0..255, which is cut off.
        hu_offset: what was added to HU, as pictures of 16 bits need it; None: nothing.

    Returns:
        int16 [Z, Y, X], and "hu", "hu_offset_<n>" or "grey_-1250_250".

    Raises:
        DistsegError: they are neither, or `intensity` contradicts them.
    """
    low, high = float(volume.values_ZYX.min()), float(volume.values_ZYX.max())
    if not np.isfinite([low, high]).all():
        raise DistsegError(f"volume {volume.path}: holds NaN or infinite values; HU are finite; mend or leave it out")
    got = f"volume {volume.path}: got values {low:g}..{high:g}"
    if hu_offset is not None:
        return _without_offset(volume, intensity, hu_offset, low, got)
    least, most = GREY_RESAMPLED
    if intensity == "grey" and not least <= low <= high <= most:
        raise DistsegError(f"{got}, declared grey; grey is 0..255; use --intensity hu or auto")
    is_flat = low == high or low >= 0 and high <= 1
    if is_flat and intensity != "hu":
        raise DistsegError(
            f"{got}, scaled to 0..1 or without contrast; HU or grey 0..255 are needed; take the volume of before it was scaled"
        )
    is_grey = low >= 0 and high <= 255 and not is_flat
    if is_grey and intensity == "hu":
        raise DistsegError(f"{got}, declared hu; they look like grey; use --intensity grey or auto")
    if is_grey or intensity == "grey":
        low_hu, high_hu = GREY_WINDOW_HU
        hu = np.clip(volume.values_ZYX, 0, 255).astype(np.float32) / 255 * (high_hu - low_hu) + low_hu
        return np.rint(hu).astype(np.int16), f"grey_{low_hu}_{high_hu}"
    is_hu = low < TISSUE_AND_AIR_HU[0] and high - low > TISSUE_AND_AIR_HU[1]
    if not (is_hu or intensity == "hu") or low < -HIGHEST_HU - 1 or high > HIGHEST_HU:
        least = USUAL_OFFSETS[int(low >= USUAL_OFFSETS[1] / 2)]
        offset = f"say --hu-offset {least} where value - {least} = HU, " if low >= 0 and high > 255 else ""
        raise DistsegError(
            f"{got}; neither HU (values below {TISSUE_AND_AIR_HU[0]}, a range above {TISSUE_AND_AIR_HU[1]}, nothing beyond "
            f"{HIGHEST_HU}) nor grey 0..255; {offset}apply the rescale slope and intercept, or say --intensity hu or grey"
        )
    return np.rint(np.maximum(volume.values_ZYX, AIR_HU)).astype(np.int16), "hu"


def _without_offset(volume: Volume, intensity: str, hu_offset: int, low: float, got: str) -> tuple[np.ndarray, str]:
    """What HU + an offset stand for; what is HU or grey without it is refused."""
    if intensity == "grey" or low < TISSUE_AND_AIR_HU[0]:
        what = "declared grey" if intensity == "grey" else "which are HU already"
        raise DistsegError(f"{got}, {what}; --hu-offset {hu_offset} is for HU + {hu_offset}; leave it out")
    values_ZYX = volume.values_ZYX.astype(np.int64 if volume.values_ZYX.dtype.kind in "iu" else np.float64) - hu_offset
    try:
        hu_ZYX, _ = hounsfield(replace(volume, values_ZYX=values_ZYX), intensity)
    except DistsegError:
        raise DistsegError(
            f"{got}, less the offset {hu_offset} no HU (values below {TISSUE_AND_AIR_HU[0]}, a range above {TISSUE_AND_AIR_HU[1]}); mend "
            "--hu-offset, or leave it out"
        ) from None
    return hu_ZYX, f"hu_offset_{hu_offset}"


def whole_labels(path: Path, values_ZYX: np.ndarray) -> np.ndarray:
    """A mask's values as whole numbers, int64 or as they are: 0.9999999 and 255 times 1/255 are 1.

    Raises:
        DistsegError: a value lies between two.
    """
    if values_ZYX.dtype.kind != "f":
        return values_ZYX
    whole_ZYX = np.rint(values_ZYX)
    away = np.abs(values_ZYX - whole_ZYX) > WHOLE
    if away.any():
        raise DistsegError(
            f"mask {path}: got value {float(values_ZYX[away][0])!r} ({int(away.sum())} voxels between whole numbers); labels are whole "
            "numbers; resample the mask with nearest neighbours"
        )
    return whole_ZYX.astype(np.int64)
