"""Slices of one volume as PNG, JPEG or TIFF: grey images in, label maps in and out, without a place in the patient."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distseg.data.file_kinds import TIFF, spacing_file
from distseg.data.volume import Volume, check_voxel_count, parsing
from distseg.errors import DistsegError
from distseg.files import written_aside

GREY_MODES = ("1", "L", "I;16", "I;16B", "I", "F")
DESCRIPTION = 270  # tag of TIFF
IMAGEJ_SLICES = re.compile(r"^ImageJ=.*^images=(\d+)$", re.MULTILINE | re.DOTALL)
JPEG_NOISE = 64  # how far compression at quality 75 and above takes 0 and 255 away, with room
JPEG_COLOUR_NOISE = 16  # the same of grey that was stored as colour


def read_pictures(files: Sequence[Path]) -> Volume:
    """Slices of one size, stacked in the order given; a TIFF may hold several, and its voxel sizes may lie beside it.

    Returns:
        uint8 (0 and 1 for one-bit files), uint16, int32 or float32 [Z, Y, X], without affine.

    Raises:
        DistsegError: no such file, another format, truncated, in colour, with a palette, or of another size than the first.
    """
    return _stacked(files, [slice_YX for path in files for slice_YX in _grey(path, _pages(path))])


def read_mask_pictures(files: Sequence[Path]) -> Volume:
    """The same of masks, where JPEG (whose compression adds noise) and one colour on black are 0 and 255.

    Raises:
        DistsegError: as `read_pictures`; or a JPEG that is not black and white, or several colours.
    """
    return _stacked(files, [slice_YX for path in files for slice_YX in _labels(path, _pages(path))])


def write_pictures(files: Sequence[Path], values_ZYX: np.ndarray) -> None:
    """Writes a PNG or TIFF a slice, or one TIFF of all slices."""
    if len(files) > 1:
        for path, slice_YX in zip(files, values_ZYX, strict=True):
            write_pictures([path], slice_YX[None])
        return
    first, *others = map(Image.fromarray, values_ZYX)
    with written_aside(files[0]) as aside:
        if files[0].suffix.lower() in TIFF:
            first.save(aside, format="TIFF", compression="tiff_deflate", save_all=bool(others), append_images=others)
        else:
            assert not others
            first.save(aside, format="PNG")


def _stacked(files: Sequence[Path], slices: Sequence[np.ndarray]) -> Volume:
    for index, slice_YX in enumerate(slices):
        if slice_YX.shape != slices[0].shape:
            path = files[min(index, len(files) - 1)]
            raise DistsegError(
                f"slice {path}: got {_size(slice_YX)} pixels; {files[0]} has {_size(slices[0])}; slices of a case have one "
                "size; resample it, or move it to a folder of its own"
            )
    check_voxel_count(files[0], (len(slices), *slices[0].shape))
    path = files[0] if len(files) == 1 else files[0].parent
    spacing_mm = _spacing_mm(files[0]) if len(files) == 1 and len(slices) > 1 else None
    return Volume(path, np.stack(slices), spacing_mm, None)


def _spacing_mm(path: Path) -> tuple[float, float, float] | None:
    """Of a three-dimensional TIFF as nnU-Net keeps it: in the order of the array's axes."""
    beside = spacing_file(path)
    if not beside.is_file():
        return None
    try:
        z_mm, y_mm, x_mm = (float(mm) for mm in json.loads(beside.read_text(encoding="utf-8-sig"))["spacing"])
        if not all(0 < mm < 1e6 for mm in (z_mm, y_mm, x_mm)):
            raise ValueError("sizes must be above 0")
    except (ValueError, KeyError, TypeError) as error:
        raise DistsegError(
            f'{beside}: got no readable spacing ({error!r}); it must hold {{"spacing": [z, y, x]}} in mm; mend it'
        ) from None
    return z_mm, y_mm, x_mm


def _pages(path: Path) -> list[tuple[str, np.ndarray]]:
    """Mode and pixels of each slice in a file."""
    if not path.is_file():
        raise DistsegError(f"slice: got {path}; no such file; check the path")
    kind = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}.get(path.suffix.lower(), "TIFF")
    with parsing("slice", path):
        with Image.open(path, formats=[kind]) as image:
            n_pages = getattr(image, "n_frames", 1)
            told = IMAGEJ_SLICES.search(str(getattr(image, "tag_v2", {}).get(DESCRIPTION, "")))
            if told and int(told[1]) != n_pages:
                raise DistsegError(
                    f"slice {path}: got a stack of {told[1]} slices that lists {n_pages}, as ImageJ writes large ones; save it as NIfTI"
                )
            check_voxel_count(path, (n_pages, image.height, image.width))
            deep = kind == "PNG" and "16" in str(image.tile[0].args)
            image.verify()  # checksums, at which reading the pixels does not look
        pages = []
        with Image.open(path, formats=[kind]) as image:
            for page in range(n_pages):
                image.seek(page)
                check_voxel_count(path, (n_pages, image.height, image.width))
                pages.append((image.mode, np.array(image)))
    if deep and pages[0][0] not in GREY_MODES:  # Pillow would drop the lower byte
        raise DistsegError(
            f"slice {path}: got 16-bit {pages[0][0]}; 16-bit slices are grey alone; save it as 16-bit grey"
        )
    return pages


def _grey(path: Path, pages: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
    slices = []
    for mode, pixels in pages:
        if mode in ("LA", "RGB", "RGBA"):
            colours = pixels[..., : 1 if mode == "LA" else 3].astype(int)
            tolerance = JPEG_COLOUR_NOISE if _is_jpeg(path) else 0
            if (np.ptp(colours, axis=-1) > tolerance).any():
                raise DistsegError(f"slice {path}: got colours; CT and masks are grey; save it as 8-bit grey")
            pixels = np.median(colours, axis=-1).astype(np.uint8)
        elif mode not in GREY_MODES:
            raise DistsegError(
                f"slice {path}: got mode {mode}; it must be grey, without a palette; save it as 8-bit grey"
            )
        slices.append(_plain(path, pixels))
    return slices


def _labels(path: Path, pages: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
    if not _is_jpeg(path):
        return _grey(path, [_one_colour(mode, pixels) for mode, pixels in pages])
    slices = _grey(path, pages)
    for slice_YX in slices:
        noise = np.minimum(slice_YX, 255 - slice_YX)
        if noise.max() > JPEG_NOISE or 0 < slice_YX.max() < 128:
            raise DistsegError(
                f"mask {path}: got values 0..{slice_YX.max()} that are not black and white; JPEG changes values, so that a mask of labels "
                "is lost in it; save the mask as PNG from where it was drawn"
            )
    return [np.where(slice_YX < 128, 0, 255).astype(np.uint8) for slice_YX in slices]


def _one_colour(mode: str, pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """A mask of black and one colour as 0 and 255; any other as it is."""
    if mode not in ("RGB", "RGBA"):
        return mode, pixels
    marked = pixels[..., :3].any(axis=-1)
    colours = pixels[marked][:, :3]
    if len(colours) == 0 or (colours[0] == colours[0][0]).all() or (colours != colours[0]).any():
        return mode, pixels
    return "L", np.where(marked, 255, 0).astype(np.uint8)


def _plain(path: Path, pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise DistsegError(
                f"slice {path}: holds NaN or infinite values; HU are finite; mend or leave out the slice"
            )
        return pixels
    if pixels.dtype.itemsize == 1:
        return pixels.astype(np.uint8)
    return pixels.astype(np.int32 if pixels.dtype.itemsize > 2 else pixels.dtype.newbyteorder("="))


def _is_jpeg(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def _size(slice_YX: np.ndarray) -> str:
    return f"{slice_YX.shape[1]} x {slice_YX.shape[0]}"
