"""Which kind of file a path names. Nothing is imported for it: a wrong path is told of before any reader is there."""

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from distseg.errors import DistsegError

NIFTI = (".nii.gz", ".nii")
SEGMENTATION = ".seg.nrrd"  # of 3D Slicer
SUFFIXES = (*NIFTI, ".mha", ".mhd", SEGMENTATION, ".nrrd", ".nhdr")  # of files that hold one whole volume
TIFF = (".tif", ".tiff")
PICTURES = (".png", ".jpg", ".jpeg", *TIFF)  # of files that hold slices without their place
IN_WORDS = "NIfTI, MetaImage, NRRD, DICOM, or slices as PNG, JPEG or TIFF"
HEADERS = (".mhd", ".nhdr")  # whose voxels lie in a file beside them, which they name
DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)[ \t]*([^\r\n]+?)\s*$", re.MULTILINE)
FIRST_CHANNEL = "_0000"  # ends the names of nnU-Net's images
LONGEST_HEADER = 2**20  # bytes
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
NOT_SUPPORTED = {".hdr": "Analyze", ".img": "Analyze", ".mgz": "MGH", ".gipl": "GIPL"}
MOST_NAMED = 20  # of what is left out; a folder may hold thousands
DICOM_MAGIC, DICOM_MAGIC_AT = b"DICM", 128  # DICOM PS3.10: after a preamble of this many bytes


def is_volume(path: Path) -> bool:
    """A file that holds one whole volume or mask, by its suffix; a TIFF of several pages is one too."""
    return path.is_file() and not path.name.startswith(".") and (has_volume_suffix(path) or is_stack(path))


def has_volume_suffix(path: Path) -> bool:
    """One of `SUFFIXES`, in any case: some converters write .NII.GZ."""
    return path.name.lower().endswith(SUFFIXES)


def volume_stem(path: Path) -> str:
    """File name without its suffix, one of `SUFFIXES` or `PICTURES`, in any case."""
    suffix = next((s for s in (*SUFFIXES, *PICTURES) if path.name.lower().endswith(s)), "")
    return path.name[: len(path.name) - len(suffix)]


def is_segmentation(path: Path) -> bool:
    """A file of named segments as 3D Slicer saves them, by its suffix."""
    return is_volume(path) and path.name.lower().endswith(SEGMENTATION)


def with_data_file(path: Path) -> tuple[Path, ...]:
    """A volume's file, and the one beside it that holds its voxels where its header names one.

    Raises:
        DistsegError: the header names a file outside its folder.
    """
    if not path.name.lower().endswith((*HEADERS, ".mha", ".nrrd")) or not path.is_file():
        return (path,)
    with path.open("rb") as file:
        header, *_ = re.split(rb"\r?\n\r?\n", file.read(LONGEST_HEADER), maxsplit=1)
    named = DATA_FILE.search(header)
    name = os.fsdecode(named[1]) if named else "LOCAL"
    if name.upper() == "LOCAL":
        return (path,)
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise DistsegError(
            f"volume {path}: got voxels in {name[:200]!r}; they lie beside the header; copy the file there and name it so"
        )
    return (path, path.parent / name)


def is_dicom(path: Path) -> bool:
    """A DICOM file of any name; DICOMDIR, which only lists others, is none."""
    if not path.is_file() or path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    with path.open("rb") as file:
        file.seek(DICOM_MAGIC_AT)
        return file.read(len(DICOM_MAGIC)) == DICOM_MAGIC


def is_picture(path: Path) -> bool:
    """A file that holds one slice, by its suffix."""
    is_named_so = path.suffix.lower() in PICTURES and not path.name.startswith(".")
    return is_named_so and path.is_file() and not is_stack(path)


def is_stack(path: Path) -> bool:
    """A TIFF of several pages: it says where a second one begins."""
    if path.suffix.lower() not in TIFF:
        return False
    with path.open("rb") as file:
        start = file.read(16)
        order: Literal["big", "little"] = "big" if start[:2] == b"MM" else "little"
        is_big = start[2:4] in (b"\0+", b"+\0")  # BigTIFF, 43
        wide, counted, entry = (8, 8, 20) if is_big else (4, 2, 12)
        file.seek(int.from_bytes(start[8:16] if is_big else start[4:8], order) % 2**62)
        entries = int.from_bytes(file.read(counted), order) % 2**32
        file.seek(entries * entry, os.SEEK_CUR)
        return int.from_bytes(file.read(wide), order) > 0


def series_files(folder: Path) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """What a folder holds of a DICOM series, by name, and what lies beside it.

    Returns:
        Its slices, with files that should be slices and may be none (empty, cut, an error page): reading names them. None where no
        file of the folder is DICOM. And what is left out: pictures, texts, DICOMDIR, folders.
    """
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
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
    if is_segmentation(path):
        return "a segmentation"
    if kind := NOT_SUPPORTED.get(path.suffix.lower()):
        return f"{kind} is not supported; convert it to NIfTI"
    return ""


def left_out_in_words(left_out: Sequence[Path], root: Path) -> str:
    """One line that names files which were not read, "" where all were: `left out: a.txt, b.mgz (MGH is not supported; convert it
    to NIfTI)`.
    """
    read = {file for folder in {path.parent for path in left_out} for file in _read_with_others(folder)}
    left_out = [path for path in left_out if path not in read]
    names = [os.path.relpath(path, root) + (f" ({what})" if (what := what_it_is(path)) else "") for path in left_out]
    if not names:
        return ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"left out: {', '.join(names[:MOST_NAMED])}{more}"


def _read_with_others(folder: Path) -> set[Path]:
    """Files that are read through one beside them: voxels of headers, spacings of TIFF volumes."""
    found = set[Path]()
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.lower().endswith(HEADERS):
            with contextlib.suppress(DistsegError, OSError):
                found |= {*with_data_file(path)[1:]}
        elif path.suffix.lower() in TIFF:
            found.add(spacing_file(path))
    return found


def spacing_file(path: Path) -> Path:
    """Where nnU-Net has the voxel sizes of a three-dimensional TIFF: case.json of case_0000.tif and of its mask case.tif."""
    return path.with_name(path.stem.removesuffix(FIRST_CHANNEL) + ".json")


def case_of_picture(path: Path) -> str:
    """Slices are named `<case>_<number>`; a picture of another name is a case of its own."""
    return re.sub(r"_\d+$", "", path.stem)


def number_of_picture(path: Path) -> tuple[int, str]:
    """Slices sort by their last number (slice_9 before slice_10), other files by name."""
    digits = re.findall(r"\d+", path.stem)
    return (int(digits[-1]) if digits and is_picture(path) else 0, path.name)
