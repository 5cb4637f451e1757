"""Slices of one volume as pictures, PNG, JPEG or TIFF: grey images and masks in, without geometry; masks out as PNG."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from distseg.data.file_kinds import PICTURE
from distseg.data.volume import VOXEL_MM, Volume, check_voxel_count, parsing
from distseg.errors import DistsegError
from distseg.files import written_aside

FORMATS = ("PNG", "JPEG", "TIFF")
GREY_MODES = ("1", "L", "I;16", "I;16B", "I;16L", "I", "F")
BETWEEN = (64, 192)  # grey that a mask of 0 and 255 has at edges alone, where JPEG has blurred it
CHANNEL = "_0000"  # nnU-Net's ending of images, which the names of side files lack


def read_pictures(files: Sequence[Path], *, is_mask: bool = False) -> Volume:
    """Slices of one size, stacked in the order given; or the pages of one TIFF.

    A TIFF of several pages takes its spacing from `<name>.json` beside it, where nnU-Net writes {"spacing": [z, y, x]}.

    Args:
        files: in order.
        is_mask: one colour on black is 0 and 255, and so is a JPEG, where nothing but edges lies between.

    Returns:
        uint8 (0 and 1 for one-bit files), 16-bit, int32 or float32 [Z, Y, X] without affine.

    Raises:
        DistsegError: no such file, no such picture, truncated, in colour, with a palette, or of another size than the first.
    """
    if len(files) == 1 and len(pages := _read_pages(files[0], is_mask)) > 1:
        return Volume(files[0], np.stack(pages), _spacing_beside(files[0]), None)
    slices = [_read_slice(path, is_mask) for path in files]
    for path, slice_YX in zip(files, slices, strict=True):
        if slice_YX.shape != slices[0].shape:
            raise DistsegError(
                f"slice {path}: got {_size(slice_YX)} pixels; {files[0]} has {_size(slices[0])}; slices of a case have one "
                "size; resample it"
            )
    return Volume(files[0] if len(files) == 1 else files[0].parent, np.stack(slices), None, None)


def write_picture(path: Path, values_ZYX: np.ndarray) -> None:
    """Writes a uint8 mask as grey PNG, or as TIFF with a page a slice; its values are the labels."""
    first, *others = map(Image.fromarray, values_ZYX)
    with written_aside(path) as aside:
        if path.name.lower().endswith(PICTURE):
            assert not others, path
            first.save(aside, format="PNG")
        else:
            first.save(aside, format="TIFF", compression="tiff_deflate", save_all=True, append_images=others)


def _read_slice(path: Path, is_mask: bool) -> np.ndarray:
    pages = _read_pages(path, is_mask)
    if len(pages) > 1:
        raise DistsegError(f"slice {path}: got {len(pages)} pages beside other slices; a slice has one; split the file")
    return pages[0]


def _read_pages(path: Path, is_mask: bool) -> list[np.ndarray]:
    if not path.is_file():
        raise DistsegError(f"slice: got {path}; no such file; check the path")
    with parsing("slice", path):
        with Image.open(path, formats=FORMATS) as image:
            n_pages = getattr(image, "n_frames", 1)
            check_voxel_count(path, (n_pages, image.height, image.width))
            deep = image.format == "PNG" and "16" in str(image.tile[0].args)
            image.verify()  # checksums, at which reading the pixels does not look
        pages = []
        with Image.open(path, formats=FORMATS) as image:
            kind = image.format
            for page in range(n_pages):
                image.seek(page)
                pages.append((image.mode, np.asarray(image)))
    return [_grey(path, mode, pixels, deep, kind == "JPEG", is_mask) for mode, pixels in pages]


def _grey(path: Path, mode: str, pixels: np.ndarray, deep: bool, is_jpeg: bool, is_mask: bool) -> np.ndarray:
    if deep and mode not in GREY_MODES:  # Pillow would drop the lower byte
        raise DistsegError(f"slice {path}: got 16-bit {mode}; 16-bit slices are grey alone; save it as 16-bit grey")
    if mode in ("LA", "RGB", "RGBA"):
        colours = pixels[..., : 1 if mode == "LA" else 3]
        pixels = _of_colours(path, colours, is_mask)
    elif mode not in GREY_MODES:
        raise DistsegError(f"slice {path}: got mode {mode}; it must be grey, without a palette; save it as 8-bit grey")
    if is_jpeg and is_mask:
        return _two_valued(path, pixels)
    return pixels if pixels.dtype != bool else pixels.astype(np.uint8)


def _of_colours(path: Path, colours_YXC: np.ndarray, is_mask: bool) -> np.ndarray:
    """Grey that is stored as colours; in a mask also one colour on black."""
    if (colours_YXC == colours_YXC[..., :1]).all():
        return colours_YXC[..., 0]
    if is_mask and len(drawn := np.unique(colours_YXC[colours_YXC.any(axis=-1)], axis=0)) == 1:
        return (colours_YXC == drawn[0]).all(axis=-1).astype(np.uint8) * 255
    raise DistsegError(
        f"slice {path}: got colours; CT is grey, a mask grey or one colour on black; save it as 8-bit grey"
    )


def _two_valued(path: Path, pixels_YX: np.ndarray) -> np.ndarray:
    """0 and 255 of a JPEG, which blurs edges; anything else would be read wrong."""
    between = (pixels_YX >= BETWEEN[0]) & (pixels_YX < BETWEEN[1])
    if ndimage.binary_erosion(between, np.ones((3, 3))).any() or 0 < pixels_YX.max() < BETWEEN[1]:
        raise DistsegError(
            f"mask {path}: got more than black and white in a JPEG, which changes values; save the mask as PNG"
        )
    return (pixels_YX >= 128).astype(np.uint8) * 255


def _spacing_beside(path: Path) -> tuple[float, float, float] | None:
    stem = path.name[: -len(path.suffix)]
    for name in (stem, stem.removesuffix(CHANNEL)):
        if (beside := path.with_name(f"{name}.json")).is_file():
            with parsing("spacing", beside):
                z_mm, y_mm, x_mm = (float(mm) for mm in json.loads(beside.read_text())["spacing"])
                if not all(VOXEL_MM[0] <= mm <= VOXEL_MM[1] for mm in (z_mm, y_mm, x_mm)):
                    raise ValueError(f"spacing {z_mm}, {y_mm}, {x_mm}")
            return z_mm, y_mm, x_mm
    return None


def _size(slice_YX: np.ndarray) -> str:
    return f"{slice_YX.shape[1]} x {slice_YX.shape[0]}"
