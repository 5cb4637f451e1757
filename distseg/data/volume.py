"""A volume as every reader gives it, and its intensities as Hounsfield units.

Inside distseg a volume is an array [Z, Y, X] with x growing to the patient's Left, y to Posterior, z to Superior, so that
a slice [Y, X] shows as a radiologist sees it.
"""

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Header
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from distseg.config import AIR_HU
from distseg.errors import DistsegError

MAX_VOXELS = 2**31  # 4 GiB of int16: far above any chest CT, far below what a broken header may claim
GREY_WINDOW_HU = (-1250, 250)  # what grey 0..255 stands for in the radiopaedia_* volumes of Zenodo 3757476
PARSING = threading.RLock()  # filters of warnings and levels of loggers are those of all threads
LPS = axcodes2ornt(("L", "P", "S"))
VOXEL_MM = (1e-6, 1e6)  # sizes that a header in any unit may mean
GRID_TOLERANCE = 0.1  # of a voxel, at the corners of two volumes on one grid: headers round positions
HIGHEST_HU = 32767  # what int16 holds; dense metal stays below it


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
    header: Nifti1Header | None = None
    """of a NIfTI file; None: of another format"""


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
    orientation = ornt_transform(io_orientation(affine), LPS)
    turned = affine @ inv_ornt_aff(orientation, values_XYZ.shape)
    x_mm, y_mm, z_mm = (round(float(mm), 6) for mm in voxel_sizes(turned))
    values_ZYX = np.ascontiguousarray(apply_orientation(values_XYZ, orientation).T)
    return Volume(path, values_ZYX, (z_mm, y_mm, x_mm), turned)


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


def hounsfield(volume: Volume, intensity: str = "auto") -> tuple[np.ndarray, str]:
    """The volume in HU, and where its intensities came from.

    Air makes every CT in HU go far below 0, so a volume within 0..255 is grey of the window [-1250, 250] HU. Values below
    air are what scanners and converters pad with (-2000, -2048, -3024, ...): they become air.

    Args:
        volume: as read.
        intensity: "auto" (decide as above), "hu" or "grey" (refuse a volume that contradicts it).

    Returns:
        int16 [Z, Y, X], and "hu" or "grey_-1250_250".

    Raises:
        DistsegError: `intensity` contradicts the values, or they are no CT.
    """
    low, high = float(volume.values_ZYX.min()), float(volume.values_ZYX.max())
    if not np.isfinite([low, high]).all():
        raise DistsegError(f"volume {volume.path}: holds NaN or infinite values; HU are finite; mend or leave it out")
    if low >= 0 and high <= 1:
        raise DistsegError(
            f"volume {volume.path}: got values {low:g}..{high:g}, scaled to 0..1 or without contrast; HU or grey 0..255 are needed; "
            "take the volume of before it was scaled"
        )
    looks_grey = low >= 0 and high <= 255
    if intensity == "grey" and not looks_grey or intensity == "hu" and looks_grey:
        seen = "grey" if looks_grey else "hu"
        raise DistsegError(
            f"volume {volume.path}: got values {low:g}..{high:g}, declared {intensity}; they look like {seen}; "
            f"use --intensity {seen} or auto"
        )
    if looks_grey:
        low_hu, high_hu = GREY_WINDOW_HU
        hu = volume.values_ZYX.astype(np.float32) / 255 * (high_hu - low_hu) + low_hu
        return np.rint(hu).astype(np.int16), f"grey_{low_hu}_{high_hu}"
    if low < -HIGHEST_HU - 1 or high > HIGHEST_HU or low >= 0:
        raise DistsegError(
            f"volume {volume.path}: got values {low:g}..{high:g}; neither HU (air is near -1000, nothing above "
            f"{HIGHEST_HU}) nor grey 0..255; apply the rescale slope and intercept, or leave the volume out"
        )
    return np.rint(np.maximum(volume.values_ZYX, AIR_HU)).astype(np.int16), "hu"
