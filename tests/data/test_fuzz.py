"""Thousands of damaged files: each is read or refused in one line, in bounded time and memory."""

import multiprocessing
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from distseg.errors import DistsegError
from tests.data.test_dicom import HU_ZYX, write_enhanced, write_segmentation, write_series

COUNTS = {"nii": 600, "nii.gz": 500, "dicom": 500, "enhanced": 200, "seg": 150, "png": 500, "npy": 300}
MEMORY_BYTES = 3 * 2**30  # of addresses: what a header claims beyond this cannot be had
SLOWEST_S = 10.0


def write_good(kind: str, folder: Path) -> Path:
    path = folder / f"good.{kind}"
    if kind.startswith("nii"):
        nib.save(nib.Nifti1Image(HU_ZYX.T, np.diag([-0.8, -0.7, 2.5, 1])), path)
    elif kind == "dicom":
        return write_series(folder / "series")[0]
    elif kind == "enhanced":
        write_enhanced(path)
    elif kind == "seg":
        write_segmentation(path, write_series(folder / "series"), {"lung": HU_ZYX > 0, "infection": HU_ZYX > 900})
    elif kind == "png":
        Image.fromarray((HU_ZYX[0] % 256).astype(np.uint8)).save(path)
    else:
        np.save(path, HU_ZYX[0])
    return path


def reader_of(kind: str) -> Callable[[Path], Any]:
    from distseg.data.dicom import read_dicom_series, read_segmentation
    from distseg.data.nifti import read_nifti
    from distseg.data.png import read_png_slices
    from distseg.data.store import read_slice

    return {
        "nii": read_nifti, "nii.gz": read_nifti, "dicom": lambda path: read_dicom_series([path]),
        "enhanced": lambda path: read_dicom_series([path]), "seg": read_segmentation,
        "png": lambda path: read_png_slices([path]), "npy": read_slice,
    }[kind]  # fmt: skip


def mutated(content: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flipped, overwritten with ones, zeros or noise, or with another file's bytes; mostly where headers are."""
    data = bytearray(content)
    header = min(len(data), 700)
    for _ in range(rng.integers(1, 4)):
        start = int(rng.integers(0, header if rng.random() < 0.7 else len(data)))
        length = int(rng.integers(1, 9))
        kind = rng.integers(0, 6)
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
        else:
            data[start : start + 32] = other[start : start + 32]
    return bytes(data)


def fuzz(kind: str, folder: str) -> list[str]:
    """What went wrong with each mutated file; runs in a process of its own, whose memory is limited."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    warnings.simplefilter("error")
    read = reader_of(kind)
    rng = np.random.default_rng(len(kind))
    good = write_good(kind, Path(folder)).read_bytes()
    other = write_good("png" if kind != "png" else "npy", Path(folder)).read_bytes()
    path = Path(folder) / f"bad.{kind}"
    wrong = []
    refused = 0
    for number in range(COUNTS[kind]):
        path.write_bytes(mutated(good, other, rng))
        start = time.perf_counter()
        try:
            read(path)
        except DistsegError as error:
            refused += 1
            if "\n" in str(error) or path.name not in str(error):
                wrong.append(f"{number}: not one line that names the file: {error}")
        except BaseException as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        if time.perf_counter() - start > SLOWEST_S:
            wrong.append(f"{number}: took more than {SLOWEST_S} s")
    if refused < COUNTS[kind] // 10:
        wrong.append(f"only {refused} refused: the mutations do nothing")
    return wrong


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_files_are_read_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(fuzz, kind, str(tmp_path)).result() == []


def test_a_header_that_claims_a_hundred_gigabytes_is_refused_before_they_are_asked_for(tmp_path: Path) -> None:
    header = nib.Nifti2Header()
    header.set_data_shape((2000, 2000, 500))  # within the limit of voxels, beyond the file
    header.set_data_dtype(np.float64)
    (tmp_path / "huge.nii").write_bytes(header.binaryblock + b"\0" * 100)
    np.save(tmp_path / "small.npy", np.zeros((2, 2), np.int16))
    huge = (tmp_path / "small.npy").read_bytes().replace(b"(2, 2), }      ", b"(99999, 999999)}")
    (tmp_path / "huge.npy").write_bytes(huge)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("huge.nii", "huge.npy"):
        with pytest.raises(DistsegError, match=name):
            reader_of(name.split(".")[1])(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB
