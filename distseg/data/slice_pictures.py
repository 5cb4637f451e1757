"""PNG slices of one volume: grey images in, without geometry."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from distseg.data.volume import Volume, check_voxel_count, parsing
from distseg.errors import DistsegError

GREY_MODES = ("1", "L", "I;16", "I;16B", "I")


def read_pictures(files: Sequence[Path]) -> Volume:
    """Slices of one size, stacked in the order given.

    Returns:
        uint8 (0 and 1 for one-bit files) or uint16 [Z, Y, X] without spacing and affine.

    Raises:
        DistsegError: no such file, not PNG, truncated, in colour, with a palette, or of another size than the first.
    """
    slices = [_read_slice(path) for path in files]
    for path, slice_YX in zip(files, slices, strict=True):
        if slice_YX.shape != slices[0].shape:
            raise DistsegError(
                f"slice {path}: got {_size(slice_YX)} pixels; {files[0]} has {_size(slices[0])}; slices of a case have one "
                "size; resample it"
            )
    return Volume(files[0] if len(files) == 1 else files[0].parent, np.stack(slices), None, None)


def _read_slice(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DistsegError(f"slice: got {path}; no such file; check the path")
    with parsing("slice", path):
        with Image.open(path, formats=["PNG"]) as image:
            check_voxel_count(path, (image.height, image.width))
            deep = "16" in str(image.tile[0].args)
            image.verify()  # checksums, at which reading the pixels does not look
        with Image.open(path, formats=["PNG"]) as image:
            mode, pixels = image.mode, np.asarray(image)
    if deep and mode not in GREY_MODES:  # Pillow would drop the lower byte
        raise DistsegError(f"slice {path}: got 16-bit {mode}; 16-bit slices are grey alone; save it as 16-bit grey")
    if mode in ("LA", "RGB", "RGBA"):
        colours = pixels[..., : 1 if mode == "LA" else 3]
        if (colours != colours[..., :1]).any():
            raise DistsegError(f"slice {path}: got colours; CT and masks are grey; save it as 8-bit grey")
        return colours[..., 0]
    if mode not in GREY_MODES:
        raise DistsegError(f"slice {path}: got mode {mode}; it must be grey, without a palette; save it as 8-bit grey")
    return pixels.astype(np.uint16 if pixels.dtype.itemsize > 1 else np.uint8)


def _size(slice_YX: np.ndarray) -> str:
    return f"{slice_YX.shape[1]} x {slice_YX.shape[0]}"
