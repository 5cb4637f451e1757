"""PNG slices: grey of any depth in, colour and palettes named."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distseg.data.slice_pictures import read_pictures
from distseg.errors import DistsegError

GREY = np.random.default_rng(0).integers(0, 256, (6, 8)).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return path


def test_grey_of_any_depth_and_grey_stored_as_colour_are_read(tmp_path: Path) -> None:
    files = [
        save(tmp_path / "l.png", GREY),
        save(tmp_path / "rgb.png", GREY, "RGB"),
        save(tmp_path / "la.png", GREY, "LA"),
    ]
    volume = read_pictures(files)
    assert (volume.values_ZYX == GREY).all() and volume.values_ZYX.dtype == np.uint8
    assert volume.spacing_mm is None and volume.affine is None and volume.path == tmp_path
    deep = GREY.astype(np.uint16) * 200
    assert np.array_equal(read_pictures([save(tmp_path / "deep.png", deep)]).values_ZYX[0], deep)
    bits = read_pictures([save(tmp_path / "bits.png", GREY > 99)])
    assert np.array_equal(bits.values_ZYX[0], GREY > 99) and bits.values_ZYX.dtype == np.uint8


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_what_is_no_grey_slice_of_the_same_size_is_named(tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", GREY)
    colour = save(tmp_path / "colour.png", np.stack([GREY, GREY, 255 - GREY], axis=-1))
    palette = save(tmp_path / "palette.png", GREY, "P")
    small = save(tmp_path / "small.png", GREY[:5])
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:50])
    deep = tmp_path / "deep.png"
    parts = {b"IHDR": struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(b"\0" * 7), b"IEND": b""}
    deep.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts.items()))  # Pillow writes none
    flipped = tmp_path / "flipped.png"
    content = bytearray(good.read_bytes())
    content[-20] ^= 1
    flipped.write_bytes(content)
    for path, message in (
        (deep, "deep.png: got 16-bit RGB"),
        (flipped, "flipped.png: damaged or not readable"),
        (colour, "colour.png: got colours"),
        (palette, "palette.png: got mode P"),
        (small, r"small.png: got 8 x 5 pixels; .*good.png has 8 x 6"),
        (cut, "cut.png: damaged or not readable"),
        (tmp_path / "none.png", "none.png; no such file"),
    ):
        with pytest.raises(DistsegError, match=message):
            read_pictures([good, path])
