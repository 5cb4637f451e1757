"""MetaImage volumes (.mha, or .mhd with its data file) in and masks out: a text header and bytes.

The header is a few lines `Key = Value`; ElementDataFile is the last, and says where the bytes are.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from distseg.data.volume import LPS_TO_RAS, Volume, as_stored, in_lps, parsing
from distseg.data.voxel_bytes import read_voxels
from distseg.errors import DistsegError
from distseg.files import written_aside

LONGEST_HEADER = 2**16
TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
# Each has had several names; AnatomicalOrientation is no more than a comment, and often a wrong one.
MATRIX = ("TransformMatrix", "Rotation", "Orientation")
ORIGIN = ("Offset", "Position", "Origin")
SPACING = ("ElementSpacing", "ElementSize")  # the distance of voxels goes before their extent
BIG_ENDIAN = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
GEOMETRY = (*MATRIX, *ORIGIN, "CenterOfRotation", "AnatomicalOrientation", *SPACING)
NOWHERE = "its header has no {}, so it does not say where it lies; taken as SimpleITK does: x grows to the left, y to the back, z upwards, from 0"


class MetaHeader(dict[str, str]):
    """The lines of a header, as they are."""


def read_metaimage(path: Path) -> Volume:
    """Reads a three-dimensional .mha or .mhd file of one value a voxel.

    Raises:
        DistsegError: no MetaImage, of several channels or files, damaged, cut, or without a usable geometry.
    """
    with parsing("volume", path):
        header, attached = _parsed(path)
        _check_kind(path, header)
        shape = [int(n) for n in header["DimSize"].split()]
        if len(shape) != 3 or int(header["NDims"]) != 3:
            raise DistsegError(
                f"volume {path}: got DimSize {shape}; it must be three-dimensional; take one volume out of it"
            )
        affine = _affine(path, header)
        order = ">" if any(_is_true(header.get(name, "False")) for name in BIG_ENDIAN) else "<"
        dtype = np.dtype(order + TYPES[header["ElementType"]])
        compression = "deflate" if _is_true(header.get("CompressedData", "False")) else ""
        if compression and len(attached) > (size := int(header.get("CompressedDataSize", len(attached)))):
            attached = attached[:size]
        values_XYZ = read_voxels(path, attached, dtype, shape, compression, int(header.get("HeaderSize", 0)))
    missing = [names[0] for names in (MATRIX, ORIGIN) if not any(name in header for name in names)]
    notes = (f"{path.name}: {NOWHERE.format(' and no '.join(missing))}",) if missing else ()
    return replace(in_lps(path, values_XYZ, affine), header=header, notes=notes)


def write_metaimage(path: Path, values_ZYX: np.ndarray, volume: Volume) -> None:
    """Writes a mask, or a map of probabilities, where its volume lies; of a MetaImage the geometry's lines are copied.

    Args:
        path: .mha (compressed), or .mhd, beside which .raw is written.
        values_ZYX: uint8 or float32.
        volume: as it was read.
    """
    assert volume.stored_affine is not None
    stored_XYZ = as_stored(values_ZYX, volume.stored_affine)
    lines = volume.header if isinstance(volume.header, MetaHeader) else _lines_of(volume.stored_affine)
    is_whole = path.name.lower().endswith(".mha")
    voxels = stored_XYZ.astype(stored_XYZ.dtype.newbyteorder("<")).tobytes(order="F")
    stored = zlib.compress(voxels) if is_whole else voxels
    type_of = {code: name for name, code in TYPES.items()}
    header = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False"}
    header |= (
        {"CompressedData": "True", "CompressedDataSize": str(len(stored))} if is_whole else {"CompressedData": "False"}
    )
    header |= {name: lines[name] for name in GEOMETRY if name in lines}
    header |= {"DimSize": " ".join(map(str, stored_XYZ.shape)), "ElementType": type_of[stored_XYZ.dtype.str[1:]]}
    header |= {"ElementDataFile": "LOCAL" if is_whole else path.with_suffix(".raw").name}
    text = "".join(f"{name} = {value}\n" for name, value in header.items()).encode()
    if not is_whole:
        with written_aside(path.with_suffix(".raw")) as aside:
            aside.write_bytes(stored)
    with written_aside(path) as aside:
        aside.write_bytes(text + (stored if is_whole else b""))


def _parsed(path: Path) -> tuple[MetaHeader, bytes]:
    """The lines of the header, and the bytes behind them."""
    content = path.read_bytes()
    end = re.search(rb"^ElementDataFile[^\n]*\n?", content[:LONGEST_HEADER], re.MULTILINE)
    if end is None:
        raise DistsegError(
            f"volume {path}: damaged or not readable (no header of MetaImage: no line ElementDataFile); copy or download it again"
        )
    header = MetaHeader()
    for line in content[: end.end()].decode("utf-8").splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if line.strip() and (not equals or name in header):
            raise DistsegError(
                f"volume {path}: got header line {line[:80]!r}; each is one `Key = Value`; mend the header"
            )
        if name:
            header[name] = value
    return header, content[end.end() :]


def _check_kind(path: Path, header: Mapping[str, str]) -> None:
    """Refuses what the format can say and this reader does not read."""
    for name in ("NDims", "DimSize", "ElementType"):
        if name not in header:
            raise DistsegError(f"volume {path}: got a header without {name}; it says what voxels are; mend the header")
    read = {
        "ObjectType": "Image", "BinaryData": "True", "ElementNumberOfChannels": "1", "ElementToIntensityFunctionSlope": "1",
        "ElementToIntensityFunctionOffset": "0",
    }  # fmt: skip
    for name, only in read.items():
        value = header.get(name, only)
        if value.lower() != only.lower() and not (only in "01" and float(value) == float(only)):
            raise DistsegError(
                f"volume {path}: got {name} = {value}; only {only} is read; save it anew, as one CT volume"
            )
    if header["ElementType"] not in TYPES:
        raise DistsegError(
            f"volume {path}: got ElementType {header['ElementType']}; it must be one of {', '.join(TYPES)}; convert it"
        )
    if re.search(r"^LIST|%|\s\d+$", header["ElementDataFile"]):
        raise DistsegError(
            f"volume {path}: got voxels in several files ({header['ElementDataFile'][:80]}); one file holds them all; save it as .mha"
        )


def _affine(path: Path, header: Mapping[str, str]) -> np.ndarray:
    """Index -> mm to the Right, Anterior, Superior. The matrix is written column by column: three numbers are an axis."""
    spacing_mm = _numbers(path, header, SPACING, 3)
    if spacing_mm is None:
        raise DistsegError(
            f"volume {path}: got a header without ElementSpacing; CT has voxels of some mm; mend the header"
        )
    matrix, origin = _numbers(path, header, MATRIX, 9), _numbers(path, header, ORIGIN, 3)
    axes = np.eye(3) if matrix is None else matrix.reshape(3, 3).T
    if not np.allclose(np.linalg.norm(axes, axis=0), 1, atol=1e-3) or (spacing_mm <= 0).any():
        raise DistsegError(
            f"volume {path}: got axes {axes.T.tolist()} and voxels of {spacing_mm.tolist()} mm; axes have length 1, sizes are above 0; "
            "mend the header"
        )
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing_mm
    affine[:3, 3] = np.zeros(3) if origin is None else origin
    return LPS_TO_RAS @ affine


def _numbers(path: Path, header: Mapping[str, str], names: tuple[str, ...], count: int) -> np.ndarray | None:
    name = next((name for name in names if name in header), None)
    if name is None:
        return None
    numbers = np.array(header[name].split(), np.float64)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise DistsegError(f"volume {path}: got {name} = {header[name]}; it must be {count} numbers; mend the header")
    return numbers


def _lines_of(affine: np.ndarray) -> dict[str, str]:
    """The geometry's lines for a volume of another format."""
    in_file = LPS_TO_RAS @ affine
    sizes_mm = np.linalg.norm(in_file[:3, :3], axis=0)
    numbers = {
        "TransformMatrix": (in_file[:3, :3] / sizes_mm).T.ravel(),
        "Offset": in_file[:3, 3],
        "CenterOfRotation": np.zeros(3),
        "ElementSpacing": sizes_mm,
    }
    return {name: " ".join(repr(float(number) + 0.0) for number in values) for name, values in numbers.items()}


def _is_true(value: str) -> bool:
    if value.lower() not in ("true", "false", "1", "0"):
        raise ValueError(f"{value} is neither True nor False")
    return value.lower() in ("true", "1")
