"""MetaImage volumes (.mha; .mhd with its data beside it) in, and masks out: a text header, then voxels.

The format is that of ITK's MetaIO (https://itk.org/Wiki/MetaIO/Documentation).
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from distseg.data.volume import LPS_TO_RAS, Stored, Volume, as_stored, check_voxel_count, in_lps, parsing, stored_affine
from distseg.errors import DistsegError
from distseg.files import written_aside

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
MATRIX, ORIGIN = ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin")
SPACING = ("ElementSpacing", "ElementSize")
LONGEST_HEADER = 2**20  # bytes
LAST = "ElementDataFile"  # the header ends behind it
LOCAL = "LOCAL"  # the voxels follow


def read_metaimage(path: Path) -> Volume:
    """Reads a three-dimensional MetaImage with one value a voxel.

    Raises:
        DistsegError: no such file, not MetaImage, cut, of another shape or type, or with data in several files or elsewhere.
    """
    if not path.is_file():
        raise DistsegError(f"volume: got {path}; no such file; check the path")
    with parsing("volume", path):
        with path.open("rb") as file:
            fields, length = _fields(file.read(LONGEST_HEADER), path)
        shape = _shape(fields, path)
        kind = np.dtype(TYPES.get(fields.get("ElementType", ""), "V1"))
        if kind.kind == "V":
            raise DistsegError(
                f"volume {path}: got voxels of type {fields.get('ElementType')}; they must be real numbers; convert it"
            )
        if int(fields.get("ElementNumberOfChannels", 1)) != 1:
            raise DistsegError(f"volume {path}: got several values a voxel; it must be one; take one channel out of it")
        is_big = _is_true(fields, "BinaryDataByteOrderMSB") or _is_true(fields, "ElementByteOrderMSB")
        data = _data(path, fields, length, int(np.prod(shape, dtype=np.int64)) * kind.itemsize)
        values_XYZ = np.frombuffer(data, kind.newbyteorder(">" if is_big else "<")).reshape(shape, order="F")
        affine = _affine(fields)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise DistsegError(f"volume {path}: got affine {affine.tolist()}; it must be invertible; mend the header")
        if kind.kind == "f" and not np.isfinite(values_XYZ).all():
            raise DistsegError(
                f"volume {path}: holds NaN or infinite values; HU are finite; mend or leave out the volume"
            )
        volume = in_lps(path, values_XYZ.astype(kind), affine)
    return replace(volume, stored=Stored(affine, fields))


def write_metaimage(path: Path, values_ZYX: np.ndarray, volume: Volume) -> None:
    """Writes a uint8 mask or float32 map where its volume lies: geometry as text where that is a MetaImage too.

    Args:
        path: ends in .mha, or in .mhd: the voxels go beside it as .zraw then.
        values_ZYX, volume: see `write_volume`.
    """
    affine = stored_affine(volume)
    values_XYZ = as_stored(values_ZYX, affine)
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "True",
    }
    data = zlib.compress(np.ascontiguousarray(values_XYZ.T).tobytes(), 1)
    fields |= {"CompressedDataSize": str(len(data))} | _geometry(volume, affine)
    fields |= {
        "DimSize": " ".join(map(str, values_XYZ.shape)),
        "ElementType": "MET_UCHAR" if values_ZYX.dtype == np.uint8 else "MET_FLOAT",
    }
    is_detached = path.name.lower().endswith(".mhd")
    beside = path.with_suffix(".zraw")
    text = "".join(
        f"{name} = {value}\n" for name, value in (fields | {LAST: beside.name if is_detached else LOCAL}).items()
    )
    if is_detached:
        with written_aside(beside) as aside:
            aside.write_bytes(data)
    with written_aside(path) as aside:
        aside.write_bytes(text.encode() + (b"" if is_detached else data))


def _fields(start: bytes, path: Path) -> tuple[dict[str, str], int]:
    """The header's fields, and its length."""
    end = re.search(rb"^\s*%s\s*=.*\n?" % LAST.encode(), start, re.MULTILINE)
    if not end:
        raise DistsegError(
            f"volume {path}: damaged or not readable (no header of MetaImage); copy or download it again"
        )
    lines = start[: end.end()].decode("utf-8", "replace").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}, end.end()


def _shape(fields: Mapping[str, str], path: Path) -> tuple[int, ...]:
    shape = tuple(int(n) for n in fields["DimSize"].split())
    if len(shape) != int(fields["NDims"]) or len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise DistsegError(
            f"volume {path}: got shape {shape}; it must be three-dimensional and not empty; take one volume out of it"
        )
    check_voxel_count(path, shape)
    return shape[:3]


def _data(path: Path, fields: Mapping[str, str], length: int, expected: int) -> bytes:
    """The voxels' bytes, of this file or of the one beside it."""
    name = fields[LAST]
    if name != LOCAL and (Path(name).name != name or not (path.parent / name).is_file()):
        raise DistsegError(
            f"volume {path}: got data in {name!r}; it must be one file beside the header; copy it there, or convert to .mha"
        )
    file = path if name == LOCAL else path.parent / name
    stored = file.read_bytes()[length if name == LOCAL else 0 :]
    skipped = int(fields.get("HeaderSize", 0))
    stored = stored[-expected:] if skipped < 0 else stored[skipped:]
    if _is_true(fields, "CompressedData"):
        unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)
        stored = unpacking.decompress(stored, expected + 1)
        if not unpacking.eof and len(stored) <= expected:
            unpacking.decompress(unpacking.unconsumed_tail, 1)  # its checksum
        if not unpacking.eof:
            raise DistsegError(
                f"volume {path}: truncated or damaged (its packed voxels do not end); copy or download it again"
            )
    if len(stored) != expected:
        raise DistsegError(
            f"volume {path}: truncated or damaged (got {len(stored)} bytes of voxels; the header says {expected}); copy or download it "
            "again"
        )
    return stored


def _affine(fields: Mapping[str, str]) -> np.ndarray:
    """4 x 4, index -> mm to the Right, Anterior, Superior. The file has a direction an axis, as one line."""
    matrix, origin, spacing = (_numbers(fields, names) for names in (MATRIX, ORIGIN, SPACING))
    n = int(fields["NDims"])
    directions = np.eye(n) if matrix is None else matrix.reshape(n, n).T
    affine = np.eye(4)
    affine[:3, :3] = directions[:3, :3] * (np.ones(3) if spacing is None else spacing[:3])
    affine[:3, 3] = np.zeros(3) if origin is None else origin[:3]
    return LPS_TO_RAS @ affine


def _numbers(fields: Mapping[str, str], names: tuple[str, ...]) -> np.ndarray | None:
    text = next((fields[name] for name in names if name in fields), None)
    return None if text is None else np.array(text.split(), float)


def _geometry(volume: Volume, affine: np.ndarray) -> dict[str, str]:
    """Lines of the source, which readers then read alike, or the affine in words of the format."""
    known = volume.stored.header if volume.stored else None
    if isinstance(known, dict) and LAST in known and known["NDims"] == "3":
        return {
            name: known[name]
            for name in (*MATRIX, *ORIGIN, *SPACING, "CenterOfRotation", "AnatomicalOrientation")
            if name in known
        }
    lps = LPS_TO_RAS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    words = (lps[:3, :3] / spacing).T.ravel(), lps[:3, 3], spacing
    return {
        name: " ".join(repr(float(v)) for v in values)
        for name, values in zip((MATRIX[0], ORIGIN[0], SPACING[0]), words, strict=True)
    }


def _is_true(fields: Mapping[str, str], name: str) -> bool:
    return fields.get(name, "False").lower().startswith(("t", "1", "y"))
