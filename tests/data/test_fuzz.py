"""Thousands of damaged files: each is read or refused in one line, in bounded time and memory, without a word on stderr."""

import contextlib
import gzip
import io
import logging
import multiprocessing
import os
import resource
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.uid import RLELossless

from distseg.data.volume import Volume, parsing
from distseg.data.volume_files import write_volume
from distseg.errors import DistsegError
from tests.data.test_dicom import HU_ZYX, write_enhanced, write_segmentation, write_series

COUNTS = {"nii": 500, "nii.gz": 400, "dicom": 500, "enhanced": 250, "rle": 200, "seg": 100, "png": 400, "npy": 300,
          "mha": 400, "nrrd": 400, "seg.nrrd": 300, "tif": 300, "jpg": 200}  # fmt: skip
PIXEL_DATA = 0x7FE00010
DICOM = ("dicom", "enhanced", "rle", "seg")
ADDRESSES = 3 * 2**30  # what a header claims beyond this cannot be had
GROWTH_KB = 300_000  # of resident memory, over all files of a kind; the good ones hold 2 kB of voxels
SLOWEST_S = 5.0
ABSURD = [
    *(struct.pack("<f", value) for value in (np.nan, np.inf, 3e38, -1e-38, 0)),
    *(struct.pack("<h", value) for value in (32767, -1, 0)),
    struct.pack(">I", 2**31 - 1),
]
DIGITS = [b"9", b"0", b"-", b".", b"e", b"\\"]
ELEMENT_VALUES = [
    *(
        b"",
        b"nan",
        b"inf ",
        b"1e300 ",
        b"-1e300",
        b"1e-300",
        b"0 ",
        b"-1",
        b"1\\2 ",
        b"1\\2\\3\\4 ",
        b"a\nb ",
        b"65535 ",
    ),
    *(b"\xff\xff", b"\0\0", b"\xff" * 4, b"\0" * 64),
]


def write_good(kind: str, folder: Path) -> Path:
    path = folder / f"good.{kind}"
    if kind.startswith("nii"):
        nib.save(nib.Nifti1Image(HU_ZYX.T, np.diag([-0.8, -0.7, 2.5, 1])), path)
    elif kind == "dicom":
        return write_series(folder / "series")[0]
    elif kind == "enhanced":
        write_enhanced(path)
    elif kind == "rle":
        dataset = pydicom.dcmread(write_enhanced(path))
        dataset.compress(RLELossless)
        dataset.save_as(path)
    elif kind == "seg":
        write_segmentation(path, write_series(folder / "series"), {"lung": HU_ZYX > 0, "infection": HU_ZYX > 900})
    elif kind in ("mha", "nrrd"):
        affine = np.diag([-0.8, -0.7, 2.5, 1])
        write_volume([path], HU_ZYX.astype(np.float32), Volume(path, HU_ZYX, None, affine, affine))
    elif kind == "seg.nrrd":
        header = "NRRD0004\ntype: unsigned char\ndimension: 4\nspace: left-posterior-superior\nsizes: 2 {2} {1} {0}\nencoding: raw\n"
        header += "space directions: none (0.8,0,0) (0,0.7,0) (0,0,2.5)\nspace origin: (1,2,3)\nkinds: list domain domain domain\n"
        for n, name in enumerate(("lung", "infection")):
            header += f"Segment{n}_Name:={name}\nSegment{n}_Layer:={n}\nSegment{n}_LabelValue:=1\n"
        layers = np.stack([HU_ZYX > 0, HU_ZYX > 900], axis=-1).astype(np.uint8)
        path.write_bytes(header.format(*HU_ZYX.shape).encode() + b"\n" + layers.tobytes())
    elif kind in ("png", "jpg"):
        Image.fromarray((HU_ZYX[0] % 256).astype(np.uint8)).save(path)
    elif kind == "tif":
        first, *others = map(Image.fromarray, (HU_ZYX % 256).astype(np.uint8))
        first.save(path, save_all=True, append_images=others)  # libtiff, which unpacks others, speaks on stderr itself
    else:
        np.save(path, HU_ZYX[0])
    return path


def reader_of(kind: str) -> Callable[[Path], Any]:
    from distseg.data.dicom import read_dicom_series, read_segmentation
    from distseg.data.metaimage import read_metaimage
    from distseg.data.nifti import read_nifti
    from distseg.data.nrrd import read_nrrd, read_segments, segment_names
    from distseg.data.slice_pictures import read_pictures
    from distseg.data.store import read_slice

    return {
        "nii": read_nifti, "nii.gz": read_nifti, "dicom": lambda path: read_dicom_series([path]),
        "enhanced": lambda path: read_dicom_series([path]), "rle": lambda path: read_dicom_series([path]), "seg": lambda path: read_segmentation(path)[0],
        "png": lambda path: read_pictures([path]), "npy": read_slice, "mha": read_metaimage, "nrrd": read_nrrd,
        "seg.nrrd": lambda path: read_segments(path, dict.fromkeys(segment_names(path), 1)),
        "tif": lambda path: read_pictures([path]), "jpg": lambda path: read_pictures([path]),
    }[kind]  # fmt: skip


def mutated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flipped, overwritten with ones, zeros, noise, absurd numbers or another file's bytes; mostly in headers."""
    data = bytearray(content)
    header = min(len(data), 700)
    digits = [place for place, byte in enumerate(content[:header]) if 48 <= byte <= 57] or [0]
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(0, header if rng.random() < 0.7 else len(data)))
        length = int(rng.integers(1, 9))
        kind = rng.integers(0, 8)
        if kind == 0:
            data = data[:start] or data
        elif kind == 1:
            for place in rng.integers(0, len(data), 8).tolist():
                data[place] ^= 1 << int(rng.integers(0, 8))
        elif kind == 2:
            data[start : start + length] = b"\xff" * length
        elif kind == 3:
            data[start : start + length] = b"\0" * length
        elif kind == 4:
            data[start : start + length] = rng.bytes(length)
        elif kind == 5:
            absurd = ABSURD[rng.integers(len(ABSURD))]
            start &= ~1  # fields lie at even places
            data[start : start + len(absurd)] = absurd
        elif kind == 6:
            for place in rng.choice(digits, 4).tolist():
                data[place : place + 1] = DIGITS[rng.integers(len(DIGITS))]
        else:
            data[start : start + 32] = other[start : start + 32]
    return bytes(data)


def with_true_checksums(png: bytes) -> bytes:
    """So that what is damaged gets past them, to the decoder."""
    out, place = png[:8], 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place + 4 : place + 8 + length]
        out += png[place : place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += 12 + length
    return out


def with_another_line(content: bytes, rng: np.random.Generator) -> bytes:
    """A header of text, one line of which is gone, twice there, changed in a character, or has another number."""
    end = content.find(b"\n\n") if content.startswith(b"NRRD") else content.find(b"ElementDataFile")
    lines = content[:end].split(b"\n")
    place, kind = int(rng.integers(len(lines))), rng.integers(4)
    line = bytearray(lines[place] or b" ")
    line[rng.integers(len(line))] = int(rng.integers(32, 127))
    number = [b"nan", b"-1", b"0", b"1e400", b"99999999999", b"3 3"][rng.integers(6)]
    changed = [b"", lines[place] + b"\n" + lines[place], bytes(line), lines[place].rpartition(b" ")[0] + b" " + number][
        kind
    ]
    lines[place : place + 1] = [changed] if changed else []
    return b"\n".join(lines) + content[end:]


def with_another_element(dicom: bytes, rng: np.random.Generator) -> bytes:
    """One element, however deep, removed or given an absurd value."""
    dataset = pydicom.dcmread(io.BytesIO(dicom))
    every = [(inner, tag) for inner in datasets_in(dataset) for tag in inner.keys() if tag != PIXEL_DATA]  # noqa: SIM118
    inner, tag = every[rng.integers(len(every))]
    element, value = inner[tag], ELEMENT_VALUES[rng.integers(len(ELEMENT_VALUES))]
    del inner[tag]
    if rng.random() < 0.8 and element.VR != "SQ":
        inner[tag] = RawDataElement(tag, element.VR, len(value), value, 0, False, True)
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


def datasets_in(dataset: pydicom.Dataset) -> Iterator[pydicom.Dataset]:
    yield dataset
    for element in dataset:
        for item in element.value if element.VR == "SQ" else ():
            yield from datasets_in(item)


def mutations(kind: str, good: bytes, other: bytes) -> Iterator[bytes]:
    """Damaged files without end, every second one so that the damage gets past the first check."""
    rng = np.random.default_rng(len(kind))
    while True:
        yield mutated(good, other, rng)
        if kind in ("mha", "nrrd", "seg.nrrd"):
            yield with_another_line(good, rng)
        if kind == "nii.gz":
            yield gzip.compress(mutated(gzip.decompress(good), other, rng), 1)
        elif kind in DICOM:
            yield with_another_element(good, rng)
        elif kind == "png":
            yield with_true_checksums(mutated(good, other, rng))


def check(read: Any, kind: str) -> None:
    """What every reader promises of what it lets through."""
    if kind == "npy":
        assert isinstance(read, np.ndarray)
        return
    assert isinstance(read, Volume) and read.values_ZYX.ndim == 3 and read.values_ZYX.size > 0
    assert read.values_ZYX.dtype.kind in "iuf" and np.isfinite(read.values_ZYX).all()
    if kind in ("png", "tif", "jpg"):
        assert read.spacing_mm is None and read.affine is None
    else:
        assert read.spacing_mm is not None and 0 < min(read.spacing_mm) <= max(read.spacing_mm) < np.inf
        assert (
            read.affine is not None and np.isfinite(read.affine).all() and np.isfinite(np.linalg.inv(read.affine)).all()
        )


def fuzz(kind: str, folder: Path, count: int) -> list[str]:
    """What went wrong with each mutated file; runs in a process of its own, whose memory is limited."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    warnings.simplefilter("error")
    said = folder / "stderr"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    read = reader_of(kind)
    path = write_good(kind, folder)
    check(read(path), kind)
    grown_from = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = mutations(kind, path.read_bytes(), write_good("png" if kind != "png" else "npy", folder).read_bytes())
    path = folder / f"bad.{kind}"
    wrong = []
    refused = 0
    for number in range(count):
        path.write_bytes(next(files))
        start = time.perf_counter()
        try:
            check(read(path), kind)
        except DistsegError as error:
            refused += 1
            if "\n" in str(error) or path.name not in str(error):
                wrong.append(f"{number}: not one line that names the file: {error}")
        except BaseException as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        if (elapsed_s := time.perf_counter() - start) > SLOWEST_S:
            wrong.append(f"{number}: took {elapsed_s:.1f} s")
        if said.stat().st_size:
            wrong.append(f"{number}: said {said.read_text()!r}")
            os.truncate(said, 0)
    if not count // 10 < refused < count:
        wrong.append(f"{refused} of {count} refused: the mutations do nothing, or nothing gets past the first check")
    if (grown := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown_from) > GROWTH_KB:
        wrong.append(f"memory grew by {grown} kB")
    return wrong


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(fuzz, kind, tmp_path, COUNTS[kind]).result() == []


def write_claims(folder: Path) -> dict[str, Path]:
    """Small files whose headers claim what no machine holds, by the kind that reads them."""
    header = nib.Nifti2Header()
    header.set_data_shape((2000, 2000, 500))  # within the limit of voxels, beyond the file
    header.set_data_dtype(np.float64)
    (folder / "huge.nii").write_bytes(header.binaryblock + b"\0" * 100)
    small = write_good("npy", folder).read_bytes()
    (folder / "huge.npy").write_bytes(small.replace(b"(12, 16), }      ", b"(99999, 999999)} "))
    png = bytearray(write_good("png", folder).read_bytes())
    png[16:24] = struct.pack(">II", 300_000, 300_000)
    (folder / "huge.png").write_bytes(with_true_checksums(bytes(png)))
    claims = {kind: folder / f"huge.{kind}" for kind in ("nii", "npy", "png")}
    for kind in DICOM:
        dataset = pydicom.dcmread(write_good(kind, folder))
        if kind == "seg":  # slices a kilometre apart: thousands of empty ones between them
            dataset.Rows = dataset.Columns = 4096
            dataset.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0].ImagePositionPatient[2] = (
                2.5 * 400_000
            )
        else:
            dataset.Rows = dataset.Columns = 65535
        claims[kind] = folder / f"huge.{kind}"
        dataset.save_as(claims[kind])
    return claims


def refuse(kind: str, path: Path) -> tuple[str, int]:
    """What a reader says of a file, and by how many kB its memory grew."""
    read = reader_of(kind)
    with contextlib.suppress(DistsegError):
        read(path.with_name("not here"))  # what is imported when first used
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DistsegError) as caught:
        read(path)
    return str(caught.value), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def test_a_header_that_claims_a_hundred_gigabytes_is_refused_before_they_are_asked_for(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for kind, path in write_claims(tmp_path).items():
            said, grown_kb = pool.submit(refuse, kind, path).result()
            assert path.name in said and "\n" not in said and grown_kb < 50_000, (kind, said, grown_kb)


@pytest.mark.parametrize("kind", ["nii.gz", "png", "mha", "nrrd"])
def test_a_flipped_bit_is_noticed_where_the_format_has_a_checksum(kind: str, tmp_path: Path) -> None:
    good, read, rng = write_good(kind, tmp_path), reader_of(kind), np.random.default_rng(0)
    if kind == "png":  # a mask, whose long runs of one value leave most damage decodable
        Image.fromarray((np.hypot(*np.mgrid[-64:64, -64:64]) < 30).astype(np.uint8) * 255).save(good)
    values_ZYX = read(good).values_ZYX
    bad, refused = tmp_path / f"bad.{kind}", 0
    for place in rng.integers(60, good.stat().st_size, 200).tolist():
        content = bytearray(good.read_bytes())
        content[place] ^= 1 << int(rng.integers(8))
        bad.write_bytes(content)
        try:
            assert np.array_equal(read(bad).values_ZYX, values_ZYX)
        except DistsegError:
            refused += 1
    assert refused > 150


def test_what_the_modules_of_a_parser_log_is_not_shown(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with parsing("dicom", tmp_path):
        logging.getLogger("pydicom.pixels.decoders.base").error("hidden")
    logging.getLogger("pydicom.pixels.decoders.base").error("shown")
    assert caplog.messages == ["shown"]
