"""Which kind of file a path names. Nothing is imported for it: a wrong path is told of before any reader is there."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

NIFTI, METAIMAGE, NRRD = (".nii.gz", ".nii"), (".mha", ".mhd"), (".seg.nrrd", ".nrrd", ".nhdr")
SEGMENTS = ".seg.nrrd"  # of 3D Slicer
SUFFIXES = (*NIFTI, *METAIMAGE, *NRRD)  # of files that hold one whole volume
PICTURE = ".png"  # that is written
PICTURES = (PICTURE, ".jpg", ".jpeg", ".tif", ".tiff")  # of files that hold one slice
HEADERS, DATA = (".mhd", ".nhdr"), (".raw.gz", ".zraw", ".raw")  # a header, and its voxels beside it
# Lie beside slices without being one. Any other file of a series' folder is taken for a slice, and fails where it is none.
BESIDE_SLICES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".txt",
    ".csv",
    ".json",
    ".xml",
    ".md",
    ".pdf",
    ".ini",
    ".db",
)
NOT_SUPPORTED = {".hdr": "Analyze", ".img": "Analyze", ".mgz": "MGH", ".gipl": "GIPL", ".dcm.gz": "packed DICOM"}
MOST_NAMED = 20  # of what is left out; a folder may hold thousands
DICOM_MAGIC, DICOM_MAGIC_AT = b"DICM", 128  # DICOM PS3.10: after a preamble of this many bytes


def is_volume(path: Path) -> bool:
    """A file that holds one whole volume or mask, by its suffix."""
    return path.is_file() and has_volume_suffix(path) and not path.name.startswith(".")


def has_volume_suffix(path: Path) -> bool:
    """One of `SUFFIXES`, in any case: some converters write .NII.GZ."""
    return path.name.lower().endswith(SUFFIXES)


def volume_stem(path: Path) -> str:
    """File name without its suffix, one of `SUFFIXES`, in any case."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_dicom(path: Path) -> bool:
    """A DICOM file of any name; DICOMDIR, which only lists others, is none."""
    if not path.is_file() or path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        file.seek(DICOM_MAGIC_AT)
        return file.read(len(DICOM_MAGIC)) == DICOM_MAGIC


def is_picture(path: Path) -> bool:
    """A file that holds one slice, by its suffix."""
    return path.is_file() and path.suffix.lower() in PICTURES and not path.name.startswith(".")


def entries_of(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without what is hidden and without the voxels of headers."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not is_data_of_header(path))


def is_data_of_header(path: Path) -> bool:
    """x.raw or x.zraw beside x.mhd or x.nhdr."""
    stem = next((path.name[: -len(end)] for end in DATA if path.name.lower().endswith(end)), "")
    return bool(stem) and any(path.with_name(stem + suffix).is_file() for suffix in HEADERS)


def number_of(path: Path) -> tuple[int, str]:
    """Pictures sort by their last number (slice_9 before slice_10), other files by name."""
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits and is_picture(path) else 0, path.name)


def series_files(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """What a folder holds of a DICOM series, by name, and what lies beside it.

    Returns:
        Its slices, with files that should be slices and may be none (empty, cut, an error page): reading names them. None where no
        file of the folder is DICOM. And what is left out: pictures, texts, DICOMDIR, folders.
    """
    entries = entries_of(folder)
    if not any(map(is_dicom, entries)):
        return (), tuple(entries)
    beside = [path for path in entries if path.is_dir() or _lies_beside(path) and not is_dicom(path)]
    return tuple(path for path in entries if path not in set(beside)), tuple(beside)


def _lies_beside(path: Path) -> bool:
    return (
        path.name.upper() == "DICOMDIR"
        or path.suffix.lower() in (*BESIDE_SLICES, *NOT_SUPPORTED)
        or has_volume_suffix(path)
    )


def what_it_is(path: Path) -> str:
    """Why a file or folder is not read, for a list of what is left out; "" where its name says all."""
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if path.is_dir():
        return "a folder"
    if path.name.lower().endswith(SEGMENTS):
        return "a segmentation"
    if kind := NOT_SUPPORTED.get(path.suffix.lower()):
        return f"{kind} is not supported; convert it to NIfTI"
    return ""


def left_out_in_words(left_out: Sequence[Path], root: Path) -> str:
    """One line that names files which were not read: `left out: a.txt, b.nrrd (NRRD is not supported; convert it to NIfTI)`."""
    names = [os.path.relpath(path, root) + (f" ({what})" if (what := what_it_is(path)) else "") for path in left_out]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"left out: {', '.join(names[:MOST_NAMED])}{more}"
