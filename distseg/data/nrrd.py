"""NRRD volumes (.nrrd, or .nhdr with its data file) in and masks out, and segmentations of 3D Slicer (.seg.nrrd) in.

pynrrd parses the headers.
"""

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nrrd
import numpy as np

from distseg.data.label_names import as_label
from distseg.data.volume import LPS_TO_RAS, Volume, as_stored, in_lps, parsing
from distseg.data.voxel_bytes import read_voxels
from distseg.errors import DistsegError
from distseg.files import written_aside

# Directions in which the numbers of `space origin` and `space directions` grow; what +1 means in RAS.
SPACES = {
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}
COMPRESSIONS = {"raw": "", "gzip": "deflate", "gz": "deflate", "bzip2": "bzip2", "bz2": "bzip2"}
GEOMETRY = (
    "space",
    "space dimension",
    "space directions",
    "space origin",
    "space units",
    "spacings",
    "centerings",
    "kinds",
)
NOWHERE = "its header does not say where it lies ({}); taken as SimpleITK does: x grows to the left, y to the back, z upwards, from 0"
LONGEST_HEADER = 2**20  # of segmentations: a few lines for each of a hundred segments


class NrrdHeader(dict[str, Any]):
    """The fields of a header, as pynrrd gives them."""


@dataclass(frozen=True)
class Segment:
    """One structure of a segmentation."""

    name: str
    """as distseg writes it"""
    layer: int
    value: int
    """in its layer: each layer counts anew"""


def read_nrrd(path: Path) -> Volume:
    """Reads a three-dimensional file of one value a voxel; further axes of length 1 are dropped.

    Raises:
        DistsegError: no NRRD, of several channels, layers or files, damaged, cut, or without a usable geometry.
    """
    with parsing("volume", path):
        header, layers, affine = _read(path)
    if len(layers) > 1:
        raise DistsegError(
            f"volume {path}: got sizes {header['sizes'].tolist()}; a volume has one value a voxel; take one volume out of it"
        )
    return _volume(path, header, layers[0], affine)


def segment_names(path: Path) -> dict[int, str]:
    """The segments of a .seg.nrrd by their number, from 1; none where it is a plain label map."""
    with parsing("mask", path):
        header, _ = _parsed(path)
        return {number: segment.name for number, segment in enumerate(_segments(header), start=1)}


def read_segments(path: Path, label_of_segment: Mapping[int, int]) -> Volume:
    """A label map of a .seg.nrrd's segments, which may overlap in layers: the higher label is kept.

    Args:
        path: of the file.
        label_of_segment: label of each segment by its number, from 1.

    Raises:
        DistsegError: as `read_nrrd`.
    """
    with parsing("mask", path):
        header, layers, affine = _read(path)
        label_XYZ = np.zeros(layers[0].shape, np.uint8)
        segments = enumerate(_segments(header), start=1)
        for label, segment in sorted(((label_of_segment[n], s) for n, s in segments), key=lambda pair: pair[0]):
            label_XYZ[layers[segment.layer] == segment.value] = label
    return _volume(path, header, label_XYZ, affine)


def write_nrrd(path: Path, values_ZYX: np.ndarray, volume: Volume, segments: Mapping[str, int] | None = None) -> None:
    """Writes a mask, or a map of probabilities, where its volume lies; of a NRRD the geometry's fields are copied.

    Args:
        path: .nrrd, compressed.
        values_ZYX: uint8 or float32.
        volume: as it was read.
        segments: names of a mask's values, as 3D Slicer keeps them; None: it is no segmentation.
    """
    assert volume.stored_affine is not None
    stored_XYZ = as_stored(values_ZYX, volume.stored_affine)
    type_of = {code: name for name, code in reversed(TYPES.items())}
    fields = {"type": type_of[stored_XYZ.dtype.str[1:]], "dimension": 3, "sizes": stored_XYZ.shape, "encoding": "gzip"}
    fields |= {} if stored_XYZ.itemsize == 1 else {"endian": "little"}
    if isinstance(volume.header, NrrdHeader):
        fields |= {name: volume.header[name] for name in GEOMETRY if name in volume.header}
    else:
        in_file = LPS_TO_RAS @ volume.stored_affine + 0.0
        fields |= {
            "space": "left-posterior-superior",
            "space directions": in_file[:3, :3].T,
            "space origin": in_file[:3, 3],
        }
    names = sorted((value, name) for name, value in (segments or {}).items() if value)
    lines = [
        line
        for number, (value, name) in enumerate(names)
        for line in (f"_ID:=Segment_{number + 1}", f"_Name:={name}", f"_LabelValue:={value}", "_Layer:=0")
        for line in (f"Segment{number}{line}",)
    ]
    # Not by pynrrd's writer, which puts the time into the file: the same mask would never be the same bytes.
    text = "\n".join(
        ["NRRD0005", *(f"{name}: {_formatted(name, value)}" for name, value in fields.items()), *lines, "", ""]
    )
    voxels = stored_XYZ.astype(stored_XYZ.dtype.newbyteorder("<")).tobytes(order="F")
    with written_aside(path) as aside:
        aside.write_bytes(text.encode() + gzip.compress(voxels, mtime=0))


def _formatted(name: str, value: Any) -> str:
    """A field as NRRD writes it: vectors in brackets, units in quotes."""
    if name == "space origin":
        return "(" + ",".join(repr(float(number)) for number in value) + ")"
    if name == "space directions":
        return " ".join(_formatted("space origin", row) for row in value)
    if name == "space units":
        return " ".join(f'"{unit}"' for unit in value)
    return str(value) if isinstance(value, (str, int)) else " ".join(str(one) for one in value)


def _volume(path: Path, header: NrrdHeader, values_XYZ: np.ndarray, affine: np.ndarray) -> Volume:
    missing = [name for name in ("space", "space directions", "space origin") if name not in header]
    spatial = _is_spatial(header)
    for name in ("kinds", "centerings", "space directions", "spacings"):  # of the three axes that are left
        if name in header and len(header[name]) == len(spatial):
            header[name] = [value for value, is_kept in zip(header[name], spatial, strict=True) if is_kept]
    notes = (f"{path.name}: {NOWHERE.format('no ' + ' and no '.join(missing))}",) if missing else ()
    return replace(in_lps(path, values_XYZ, affine), header=header, notes=notes)


def _read(path: Path) -> tuple[NrrdHeader, list[np.ndarray], np.ndarray]:
    """The header, the layers [X, Y, Z] (one of a volume) and the affine."""
    header, attached = _parsed(path)
    shape = [int(n) for n in header["sizes"]]
    affine = _affine(path, header)
    skip = int(header.get("byte skip", header.get("byteskip", 0)))
    values = read_voxels(path, attached, _dtype(path, header), shape, COMPRESSIONS[header["encoding"]], skip)
    spatial = _is_spatial(header)
    others = [axis for axis, is_kept in enumerate(spatial) if not is_kept]
    order = [*others, *(axis for axis, is_kept in enumerate(spatial) if is_kept)]
    kept = [n for n, is_kept in zip(shape, spatial, strict=True) if is_kept]
    return header, list(values.transpose(order).reshape((-1, *kept))), affine


def _parsed(path: Path) -> tuple[NrrdHeader, bytes]:
    """The fields of a header, checked, and the bytes behind it; names of segments are UTF-8, which pynrrd would drop."""
    content = path.read_bytes()
    end = re.search(rb"\r?\n\r?\n|\Z", content[:LONGEST_HEADER])
    assert end is not None  # \Z
    lines = content[: end.start()].decode("utf-8").splitlines()
    if not lines or not lines[0].startswith("NRRD"):
        raise DistsegError(f"volume {path}: damaged or not readable (no header of NRRD); copy or download it again")
    header = NrrdHeader(nrrd.read_header(lines))
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in header:
            raise DistsegError(f"volume {path}: got a header without {name}; it says what voxels are; mend the header")
    if header["encoding"] not in COMPRESSIONS:
        raise DistsegError(
            f"volume {path}: got encoding {header['encoding']}; it must be one of {', '.join(COMPRESSIONS)}; convert it"
        )
    if len(header["sizes"]) != header["dimension"] or header["dimension"] < 3 or sum(_is_spatial(header)) != 3:
        raise DistsegError(
            f"volume {path}: got sizes {list(map(int, header['sizes']))}; it must be three-dimensional; take one volume out of it"
        )
    if header.get("line skip", header.get("lineskip", 0)):
        raise DistsegError(f"volume {path}: got lines to skip before the voxels; this is not read; save it as .nrrd")
    units = header.get("space units", ["mm"])
    if any(unit not in ("mm", "millimeters", "millimetres", "") for unit in units):
        raise DistsegError(f"volume {path}: got voxel sizes in {units}; CT's are in mm; mend the header (space units)")
    data_file = header.get("data file", header.get("datafile", ""))
    if re.search(r"^LIST|%|\s\d+$", data_file):
        raise DistsegError(
            f"volume {path}: got voxels in several files ({data_file[:80]}); one file holds them all; save it as .nrrd"
        )
    return header, content[end.end() :]


def _is_spatial(header: Mapping[str, Any]) -> list[bool]:
    """Of each axis, whether it is one of space; the others are layers of a segmentation, channels or times."""
    if (directions := header.get("space directions")) is not None:
        return [not np.isnan(np.asarray(row, float)).all() for row in directions]
    if (spacings := header.get("spacings")) is not None:
        return [bool(np.isfinite(mm)) for mm in spacings]
    return [True] * int(header["dimension"])


def _dtype(path: Path, header: Mapping[str, Any]) -> np.dtype:
    code = TYPES.get(header["type"])
    if code is None:
        raise DistsegError(f"volume {path}: got type {header['type']}; voxels must be real numbers; convert it")
    order = {"little": "<", "big": ">"}.get(header.get("endian", "little" if code[-1] == "1" else ""))
    if order is None:
        raise DistsegError(
            f"volume {path}: got endian {header.get('endian')}; it must be little or big; mend the header"
        )
    return np.dtype(order + code)


def _affine(path: Path, header: Mapping[str, Any]) -> np.ndarray:
    """Index -> mm to the Right, Anterior, Superior."""
    space = str(header.get("space", "lps")).lower()
    if space not in SPACES:
        raise DistsegError(f"volume {path}: got space {space}; it must be one of {', '.join(SPACES)}; mend the header")
    spatial = _is_spatial(header)
    if "space directions" in header:
        rows = [row for row, is_kept in zip(header["space directions"], spatial, strict=True) if is_kept]
        axes = np.array(rows, float).T
    elif "spacings" in header:
        axes = np.diag([mm for mm, is_kept in zip(header["spacings"], spatial, strict=True) if is_kept])
    else:
        raise DistsegError(
            f"volume {path}: got a header without space directions or spacings; CT has voxels of some mm; mend the header"
        )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, header.get("space origin", np.zeros(3))
    if axes.shape != (3, 3) or not np.isfinite(affine).all() or abs(np.linalg.det(axes)) < 1e-9:
        raise DistsegError(f"volume {path}: got affine {affine.tolist()}; it must be invertible; mend the header")
    return np.diag([*SPACES[space], 1.0]) @ affine


def _segments(header: Mapping[str, Any]) -> list[Segment]:
    """As Slicer writes them; before its version 5 each had a layer of its own, where it was 1."""
    found = sorted(int(match[1]) for key in header if (match := re.fullmatch(r"Segment(\d+)_Name", key)))
    if int(header["dimension"]) == 3 and len(found) > 1 and any(f"Segment{n}_LabelValue" not in header for n in found):
        raise ValueError("several segments in one layer without their LabelValue")
    return [
        Segment(
            as_label(header[f"Segment{n}_Name"]),
            int(header.get(f"Segment{n}_Layer", place if int(header["dimension"]) > 3 else 0)),
            int(header.get(f"Segment{n}_LabelValue", 1)),
        )
        for place, n in enumerate(found)
    ]
