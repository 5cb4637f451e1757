"""JPEG and TIFF slices, masks in one colour, and HU that are stored with an offset."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distseg.commands.prepare import prepare
from distseg.data.slice_pictures import read_mask_pictures, read_pictures, write_pictures
from distseg.data.volume import Volume, hounsfield
from distseg.errors import DistsegError

MASK = (np.hypot(*np.mgrid[-40:40, -30:60]) < 25).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("quality", [75, 90, 100])
def test_a_black_and_white_jpeg_is_the_mask_that_was_drawn(quality: int, tmp_path: Path) -> None:
    noisy = np.random.default_rng(0).random(MASK.shape) < 0.3
    for name, mask in (("disc", MASK), ("noise", noisy), ("empty", MASK * 0), ("full", MASK * 0 + 1)):
        for colours in (1, 3):
            pixels = (mask * 255).astype(np.uint8)
            pixels = pixels if colours == 1 else np.stack([pixels] * 3, axis=-1)
            path = save(tmp_path / f"{name}{colours}.jpg", pixels, quality=quality)
            assert np.array_equal(read_mask_pictures([path]).values_ZYX[0], mask * 255), (name, colours)


def test_a_jpeg_that_is_not_black_and_white_is_refused_as_a_mask(tmp_path: Path) -> None:
    for number, pixels in enumerate((MASK, MASK * 2, MASK * 127, MASK * 255 // 2 + MASK[::-1] * 127)):
        path = save(tmp_path / f"{number}.jpg", pixels.astype(np.uint8), quality=100)
        with pytest.raises(DistsegError, match="not black and white; JPEG changes values.*save the mask as PNG"):
            read_mask_pictures([path])
    red = save(tmp_path / "red.jpg", np.stack([MASK * 255, MASK * 0, MASK * 0], axis=-1))
    with pytest.raises(DistsegError, match=r"red.jpg: got colours"):
        read_mask_pictures([red])


def test_a_mask_of_one_colour_on_black_is_read_and_of_two_is_refused(tmp_path: Path) -> None:
    red = np.stack([MASK * 255, MASK * 0, MASK * 0], axis=-1)
    assert np.array_equal(read_mask_pictures([save(tmp_path / "r.png", red)]).values_ZYX[0], MASK * 255)
    with pytest.raises(DistsegError, match="got colours"):
        read_pictures([tmp_path / "r.png"])
    red[:10, :10] = (0, 255, 0)
    with pytest.raises(DistsegError, match="got colours"):
        read_mask_pictures([save(tmp_path / "rg.png", red)])


def test_tiff_slices_and_stacks_are_read_as_they_are(tmp_path: Path) -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (4, 6, 8))
    for dtype in (np.int16, np.int32, np.float32, np.uint16, np.uint8):
        values = (hu if dtype not in (np.uint16, np.uint8) else np.abs(hu) % 256).astype(dtype)
        path = tmp_path / f"{np.dtype(dtype)}.tif"
        first, *others = map(Image.fromarray, values)
        first.save(path, save_all=True, append_images=others, compression="tiff_lzw")
        read = read_pictures([path])
        assert np.array_equal(read.values_ZYX, values) and read.spacing_mm is None, dtype
        slices = [save(tmp_path / f"s/{z}.tiff", slice_YX) for z, slice_YX in enumerate(values)]
        assert np.array_equal(read_pictures(slices).values_ZYX, values)
    first.save(tmp_path / "imagej.tif", description="ImageJ=1.54\nimages=4\nslices=4\n")
    with pytest.raises(DistsegError, match="got a stack of 4 slices that lists 1, as ImageJ writes large ones"):
        read_pictures([tmp_path / "imagej.tif"])
    (tmp_path / "case_0000.tif").write_bytes((tmp_path / "int16.tif").read_bytes())
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [2.5, 0.7, 0.8]}))
    assert read_pictures([tmp_path / "case_0000.tif"]).spacing_mm == (2.5, 0.7, 0.8)
    (tmp_path / "case.json").write_text(json.dumps({"spacing": [2.5, 0.7]}))
    with pytest.raises(DistsegError, match=r"case.json: got no readable spacing .*\[z, y, x\]"):
        read_pictures([tmp_path / "case_0000.tif"])
    write_pictures([tmp_path / "mask.tif"], (hu > 0).astype(np.uint8))
    assert np.array_equal(read_mask_pictures([tmp_path / "mask.tif"]).values_ZYX, hu > 0)


@pytest.mark.parametrize("offset", [1024, 32768])
def test_hu_with_an_offset_are_refused_with_the_number_to_type_and_read_with_it(offset: int, tmp_path: Path) -> None:
    hu = np.linspace(-1024, 900, 6 * 8).round().reshape(1, 6, 8)
    volume = Volume(tmp_path / "v.png", (hu + offset).astype(np.uint16), None, None)
    for intensity in ("auto", "hu") if offset > 32767 else ("auto",):
        with pytest.raises(DistsegError, match=f"say --hu-offset {offset} where value - {offset} = HU"):
            hounsfield(volume, intensity)
    read, origin = hounsfield(volume, hu_offset=offset)
    assert np.array_equal(read, hu) and origin == f"hu_offset_{offset}"
    for values, intensity, message in (
        (hu, "auto", "which are HU already"),
        (hu + offset, "grey", "declared grey"),
        (hu + offset + 9000, "auto", f"less the offset {offset} no HU"),
        (np.clip(hu, 0, 255), "auto", "less the offset"),
    ):
        with pytest.raises(DistsegError, match=message):
            hounsfield(Volume(tmp_path / "v.png", values.astype(np.int32), None, None), intensity, offset)


def test_a_store_of_16_bit_pictures_holds_their_hu(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    hu = [rng.integers(-1000, 400, (6, 8)) for _ in range(3)]
    for number, slice_YX in enumerate(hu):
        save(tmp_path / f"src/images/p{number}.png", (slice_YX + 32768).astype(np.uint16))
        save(tmp_path / f"src/lung/p{number}.png", (slice_YX > 0).astype(np.uint8))
    with pytest.raises(DistsegError, match="--hu-offset 32768"):
        prepare(tmp_path / "src", tmp_path / "store", folds=2, workers=1)
    store = prepare(tmp_path / "src", tmp_path / "store", folds=2, workers=1, hu_offset=32768)
    for case, slice_YX in zip(store.cases, hu, strict=True):
        assert np.array_equal(store.read_case(case)[0][0], slice_YX) and case.intensity == "hu_offset_32768"
