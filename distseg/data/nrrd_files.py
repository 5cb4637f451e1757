"""NRRD volumes (.nrrd, .nhdr) in, and masks out; segmentations of 3D Slicer (.seg.nrrd), whose segments have names."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distseg.data.label_names import as_label
from distseg.data.volume import (
    LPS_TO_RAS,
    Stored,
    Volume,
    as_stored,
    check_voxel_count,
    in_lps,
    parsing,
    stored_affine,
    whole_labels,
)
from distseg.errors import DistsegError
from distseg.files import written_aside

# Signs that take each space's axes to Right, Anterior, Superior; "right" means that x grows to the right.
TO_RAS = {
    "left-posterior-superior": LPS_TO_RAS, "lps": LPS_TO_RAS,
    "right-anterior-superior": np.eye(4), "ras": np.eye(4),
    "left-anterior-superior": np.diag([-1.0, 1.0, 1.0, 1.0]), "las": np.diag([-1.0, 1.0, 1.0, 1.0]),
}  # fmt: skip
GEOMETRY = ("space", "space directions", "space origin", "space units", "kinds", "centers", "measurement frame")
IS_MM = ("mm", "millimeter", "millimeters", "")
PACKING_RATIO = 1032  # no gzip file unpacks to more than this many times its size
LISTS = ("list", "vector", "RGB-color", "RGBA-color", "3-color", "4-color", "complex", "2-vector", "3-vector")


def read_nrrd(path: Path) -> Volume:
    """Reads a three-dimensional NRRD file with one value a voxel.

    Raises:
        DistsegError: no such file, not NRRD, cut or damaged, of another shape, in a space that names no sides, or with data
            elsewhere.
    """
    header, values, affine = _read(path)
    if values.ndim != 3:
        raise DistsegError(
            f"volume {path}: got shape {values.shape}; it must be three-dimensional; take one volume out of it"
        )
    return replace(in_lps(path, values, affine), stored=Stored(affine, header))


def segment_names(path: Path) -> list[str]:
    """Labels of the segments that a file names, in its order; none where it is no segmentation of 3D Slicer."""
    with parsing("mask", path):
        return [as_label(name) for name in _segments(_header(path)).values()]


def read_segments(path: Path) -> tuple[Volume, dict[int, str]]:
    """A segmentation of 3D Slicer, in one layer or several.

    Returns:
        Segment numbers on the file's grid, which may be a part of the image's; where segments overlap the higher number is
        kept. And each segment's label.

    Raises:
        DistsegError: see `read_nrrd`.
    """
    header, values, affine = _read(path)
    layers = values if values.ndim == 4 else values[None]
    numbers = np.zeros(layers.shape[1:], np.int64)
    names = {}
    for number, (prefix, name) in enumerate(_segments(header).items(), start=1):
        layer = int(header.get(f"{prefix}_Layer", 0))
        value = int(header.get(f"{prefix}_LabelValue", 1))
        numbers[whole_labels(path, layers[layer]) == value] = number
        names[number] = as_label(name)
    return replace(in_lps(path, numbers, affine), stored=Stored(affine, header)), names


def write_nrrd(path: Path, values_ZYX: np.ndarray, volume: Volume, names: Mapping[str, int]) -> None:
    """Writes a uint8 mask or float32 map where its volume lies, with the fields of the source where that is NRRD too.

    Args:
        path: ends in .nrrd, or in .seg.nrrd: a segmentation of 3D Slicer, with a segment a label.
        values_ZYX, volume: see `write_volume`.
        names: of the labels, for segments.
    """
    import nrrd

    affine = stored_affine(volume)
    known = volume.stored.header if volume.stored else None
    if isinstance(known, dict) and "space directions" in known and len(known["sizes"]) == 3:
        header = {name: known[name] for name in GEOMETRY if name in known}
    else:
        lps = LPS_TO_RAS @ affine
        header = {
            "space": "left-posterior-superior",
            "space directions": lps[:3, :3].T,
            "space origin": lps[:3, 3],
            "kinds": ["domain"] * 3,
        }
    if path.name.lower().endswith(".seg.nrrd"):
        for k, (name, number) in enumerate((n, v) for n, v in names.items() if v):
            header |= {
                f"Segment{k}_ID": f"Segment_{k + 1}",
                f"Segment{k}_Name": name,
                f"Segment{k}_LabelValue": str(number),
                f"Segment{k}_Layer": "0",
            }
    with written_aside(path) as aside, aside.open("wb") as file:
        nrrd.write(file, as_stored(values_ZYX, affine), header | {"encoding": "gzip"}, compression_level=1)


def _header(path: Path) -> dict[str, Any]:
    import nrrd  # here: most sources have no such file

    if not path.is_file():
        raise DistsegError(f"volume: got {path}; no such file; check the path")
    with path.open("rb") as file:
        return dict(nrrd.read_header(file))


def _segments(header: Mapping[str, Any]) -> dict[str, str]:
    """Prefix of the fields of each segment -> its name."""
    found = sorted(
        (int(name[7:-5]), name[:-5])
        for name in header
        if name.startswith("Segment") and name[7:-5].isdecimal() and name.endswith("_Name")
    )
    return {prefix: str(header[f"{prefix}_Name"]) for _, prefix in found}


def _read(path: Path) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Header, values with the axes that lie in space last, and affine."""
    import nrrd

    with parsing("volume", path):
        header = _header(path)
        shape = tuple(int(n) for n in header["sizes"])
        check_voxel_count(path, shape)
        if (name := header.get("data file", header.get("datafile"))) is not None and (
            not isinstance(name, str) or Path(name).name != name or not (path.parent / name).is_file()
        ):
            raise DistsegError(
                f"volume {path}: got data in {name!r}; it must be one file beside the header; copy it there, or convert to .nrrd"
            )
        file = path if name is None else path.parent / name
        claimed = (
            int(np.prod(shape, dtype=np.int64))
            * np.dtype(nrrd.reader._TYPEMAP_NRRD2NUMPY.get(header["type"], "u1")).itemsize
        )
        if claimed > file.stat().st_size * PACKING_RATIO:
            raise DistsegError(
                f"volume {path}: truncated or damaged (the header claims {claimed} bytes of voxels, more than the file can hold); copy or "
                "download it again"
            )
        with path.open("rb") as stream:
            values = nrrd.read_data(dict(nrrd.read_header(stream)), stream, str(path))
        affine = _affine(path, header)
        if values.dtype.kind not in "iuf":
            raise DistsegError(
                f"volume {path}: got voxels of type {values.dtype}; they must be real numbers; convert it"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise DistsegError(
                f"volume {path}: holds NaN or infinite values; HU are finite; mend or leave out the volume"
            )
    return header, values.reshape(shape, order="A").astype(values.dtype.newbyteorder("=")), affine


def _affine(path: Path, header: Mapping[str, Any]) -> np.ndarray:
    """4 x 4, index of the axes in space -> mm to the Right, Anterior, Superior."""
    space = str(header.get("space", "")).lower()
    directions = header.get("space directions")
    if space not in TO_RAS or directions is None:
        raise DistsegError(
            f"volume {path}: got space {space or 'none'!r}{'' if directions is not None else ' without directions'}; it must say where its axes "
            f"lie ({', '.join(name for name in TO_RAS if '-' in name)}); mend the header, or convert it"
        )
    rows = np.array([row for row in np.asarray(directions, float) if np.isfinite(row).all()])
    units = [str(unit).lower() for unit in header.get("space units", ())]
    if any(unit not in IS_MM for unit in units):
        raise DistsegError(
            f"volume {path}: got voxel sizes in {', '.join(units)}; CT's are in mm; mend the header (space units)"
        )
    if (
        rows.shape != (3, 3)
        or len(directions) > 4
        or (len(directions) == 4 and np.isfinite(np.asarray(directions, float)[0]).all())
    ):
        raise DistsegError(f"volume {path}: got {len(rows)} axes in space; it must be three; take one volume out of it")
    affine = np.eye(4)
    affine[:3, :3] = rows.T
    affine[:3, 3] = np.asarray(header.get("space origin", np.zeros(3)), float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DistsegError(f"volume {path}: got affine {affine.tolist()}; it must be invertible; mend the header")
    return TO_RAS[space] @ affine
